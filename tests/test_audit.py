import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from hub_server import COMMIT, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BETAS, POINT, SAMPLERS, SD, levels, make
from safetensors.torch import save_file
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import ZeroSNRDDIMScheduler, audit, enable_guidance_rescale
from zsnr_diffusers.auditing import Audit, fix

RELEASED = {
    **SD,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
"""The scheduler config of the weights that the paper's authors released, of `DDIMScheduler`."""

STEPS = (1, 2, 5, 20, 28, 50)


def config_of(scheduler_class, **changes):
    """A scheduler config as a file has it: the released one, as far as the class takes it."""
    accepted = inspect.signature(scheduler_class.__init__).parameters
    config = {key: value for key, value in RELEASED.items() if key in accepted}
    return {"_class_name": scheduler_class.__name__, **config, **changes}


def found(result, name):
    (finding,) = [finding for finding in result.findings if finding.name == name]
    return finding


def names(result):
    return {finding.name for finding in result.findings}


def misses(scheduler, numbers=STEPS, zero_snr=True, T=1000):
    """Numbers of steps at which a scheduler does not reach data that is one point."""
    alphas, sigmas = levels(T, zero_snr)
    for n in numbers:
        scheduler.set_timesteps(n)
        x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen, alpha, sigma = scheduler.scale_model_input(x, t), alphas[int(t)], sigmas[int(t)]
            noise = (seen - alpha * POINT) / sigma
            output = noise if scheduler.config.prediction_type == "epsilon" else alpha * noise - sigma * POINT
            x = scheduler.step(output, t, x, return_dict=False)[0]
        # Stock stands in for SNR 0 with 2^-24, which leaves 2^-12 of the noise if there is but one step.
        if not abs(x.item() - POINT) < (1e-3 if n == 1 else 1e-4):
            yield n


# -- what is right passes


def test_the_released_config_passes_and_the_steps_of_stock_ddim_are_noted_with_their_numbers():
    result = audit(config_of(DDIMScheduler))
    assert result.ok
    assert result.verdict == "right"
    assert result.terminal_snr == result.terminal_alpha == 0
    assert result.first_timesteps == ((5, 999), (20, 999), (50, 999))
    assert result.final_alpha == 1
    step_size = found(result, "step-size")
    assert step_size.severity == "note"
    assert 28 in step_size.steps
    assert not {1, 5, 10, 20, 25, 40, 50, 100} & {*step_size.steps}  # they divide T, and nothing can go wrong
    assert found(result, "extra-timestep").steps == (61,)
    assert {n for n in found(result, "eta-one").steps} >= {25, 28, 30, 50}


def test_brightness_that_ddim_s_steps_cost():
    """Measured before: -6% at 28 steps and -12% at 60, of the mean of a 64 x 64 latent."""
    for n, share in ((28, "-6%"), (60, "-12%")):
        assert f"by up to {share}" in found(audit(config_of(DDIMScheduler), steps=[n]), "step-size").what


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_found_of_our_schedulers(name):
    for scheduler in (make(name), json.loads(make(name).to_json_string())):
        assert names(audit(scheduler)) == ({"not-run"} if name == "inverse" else set())


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_stock_samplers_that_are_right(cls):
    result = audit(config_of(cls))
    assert result.ok
    assert names(result) <= {"extra-timestep", "half-precision-noise"}


def test_reference_rows_are_table_1_of_the_paper():
    reference = audit(config_of(DDIMScheduler), steps=[5]).to_dict()["reference"]
    for name, ratio, alpha in (
        ("linear", 4.035993e-05, 0.006353),
        ("cosine", 2.428735e-09, 4.928220e-05),  # of float32, five digits
        ("Stable Diffusion", 0.004682, 0.068265),
    ):
        assert reference[name]["terminal_snr"] == pytest.approx(ratio, rel=1e-4)
        assert reference[name]["terminal_alpha"] == pytest.approx(alpha, rel=1e-4)


def test_deep_tries_every_number_of_steps():
    T = 44
    result = audit(config_of(DDIMScheduler, num_train_timesteps=T), deep=True)
    assert result.steps_tried == tuple(range(1, T + 1))
    stock = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    longer = [n for n in range(1, T + 1) if stock.set_timesteps(n) or len(stock.timesteps) == n + 1]
    assert [*found(result, "extra-timestep").steps] == longer != []


# -- planted faults that a change of the config mends

RESCALED = DDIMScheduler(**RELEASED).betas.tolist()

PLANTED = {
    "leading": (config_of(DDIMScheduler, timestep_spacing="leading"), "last-timestep-missed", "error"),
    "no final alpha": (config_of(DDIMScheduler, set_alpha_to_one=False), "final-alpha", "error"),
    "28 steps of DDIM": (config_of(DDIMScheduler), "step-size", "note"),
    "sigma_min": (config_of(DPMSolverMultistepScheduler, final_sigmas_type="sigma_min"), "final-sigma", "error"),
    "Karras": (config_of(DPMSolverMultistepScheduler, use_karras_sigmas=True), "log-sigma-spacing", "error"),
    "exponential": (config_of(UniPCMultistepScheduler, use_exponential_sigmas=True), "log-sigma-spacing", "error"),
    "beta": (config_of(DPMSolverMultistepScheduler, use_beta_sigmas=True), "log-sigma-spacing", "error"),
    "Lu": (config_of(DPMSolverMultistepScheduler, use_lu_lambdas=True), "log-sigma-spacing", "error"),
    "betas for a flag": (
        config_of(DDIMScheduler, rescale_betas_zero_snr=False, trained_betas=RESCALED),
        "rescaled-betas",
        "note",
    ),
    "betas for a flag, in sigma": (
        config_of(EulerDiscreteScheduler, rescale_betas_zero_snr=False, trained_betas=RESCALED),
        "rescaled-betas",
        "error",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found_and_mended(planted):
    config, name, severity = PLANTED[planted]
    result = audit(config, steps=STEPS)
    assert found(result, name).severity == severity
    assert result.ok == (severity == "note")
    scheduler = result.fixed_scheduler()
    assert type(scheduler).__module__.startswith("diffusers.")
    assert [*misses(scheduler)] == []
    after = audit(scheduler, steps=STEPS)
    assert after.ok
    assert name not in names(after)
    assert after.terminal_snr == 0
    assert scheduler.config.trained_betas is None


def ignoring():
    """Stock's samplers that take betas and no flag."""
    for name in dir(diffusers):
        if name.endswith("Scheduler") and "Flax" not in name:
            cls = getattr(diffusers, name)
            parameters = inspect.signature(cls.__init__).parameters
            if {"prediction_type", "beta_start"} <= {*parameters} and "rescale_betas_zero_snr" not in parameters:
                yield cls


@pytest.mark.parametrize("cls", [*ignoring()], ids=lambda cls: cls.__name__)
def test_a_class_that_ignores_the_flag_is_found_and_replaced(cls):
    result = audit(config_of(cls, rescale_betas_zero_snr=True))
    assert found(result, "flag-ignored").severity == "error"
    assert result.terminal_alpha == pytest.approx(0.068265, abs=1e-6)
    if found(result, "flag-ignored").fix:  # those that clip keep their class
        scheduler = result.fixed_scheduler()
        assert type(scheduler) is EulerDiscreteScheduler
        assert [*misses(scheduler)] == []
        assert audit(scheduler, steps=STEPS).ok


def test_many_classes_ignore_the_flag():
    wanted = {"Heun", "KDPM2", "KDPM2Ancestral", "LMS", "DEISMultistep", "PNDM", "SASolver", "DPMSolverSinglestep"}
    there = {cls.__name__ for cls in ignoring()}
    assert sum(any(name.startswith(prefix) for name in there) for prefix in wanted) == len(wanted)


# -- what no config tells


def test_a_v_model_without_zero_snr_is_mended_only_if_it_is_said_to_be_trained_there():
    config = config_of(DDIMScheduler, rescale_betas_zero_snr=False)
    result = audit(config)
    assert result.verdict == "not zero-SNR"
    terminal = found(result, "terminal-snr")
    assert terminal.fix is None
    assert "rescale_betas_zero_snr=True" in terminal.remedy
    assert "zsnr_diffusers.training" in terminal.remedy
    assert result.fixed_scheduler().config.rescale_betas_zero_snr is False
    told = audit(config, zero_snr=True)
    assert told.verdict == "wrong"
    assert [*misses(told.fixed_scheduler())] == []
    assert audit(told.fixed_scheduler()).ok
    assert audit(config_of(DDIMScheduler), zero_snr=False).fixed_scheduler().config.rescale_betas_zero_snr is False


def test_an_epsilon_model_is_sent_to_training_and_never_gets_the_flag():
    config = json.loads(flawed_scheduler().to_json_string())
    result = audit(config)
    terminal = found(result, "terminal-snr")
    assert (terminal.severity, terminal.fix) == ("not zero-SNR", None)
    assert "accelerate launch -m zsnr_diffusers.training --pretrained_model_name_or_path" in terminal.remedy
    scheduler = result.fixed_scheduler()  # the rest is mended
    assert scheduler.config.rescale_betas_zero_snr is False
    assert scheduler.config.prediction_type == "epsilon"
    assert [*misses(scheduler, zero_snr=False)] == []
    assert names(audit(scheduler)) == {"terminal-snr", "extra-timestep"}
    assert found(audit(DDPMScheduler(), zero_snr=True), "terminal-snr").fix is None


def test_the_cosine_schedule_is_nearly_zero_and_not_zero():
    """Models of epsilon are trained on it, and stock's stand-in for zero is above it."""
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    result = audit(config_of(DDIMScheduler, **cosine), steps=STEPS)
    assert result.terminal_alpha == pytest.approx(4.928e-05, rel=1e-3)
    assert result.verdict == "not zero-SNR"
    assert "epsilon-at-zero-snr" not in names(result)
    flagged = {**cosine, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert "flag-ignored" in names(audit(config_of(PNDMScheduler, **flagged), steps=STEPS))
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        assert audit(config_of(cls, **flagged), steps=STEPS).ok


def test_epsilon_at_zero_snr_is_mended_only_if_it_is_said_what_the_network_predicts():
    config = config_of(DDIMScheduler, prediction_type="epsilon")
    result = audit(config)
    assert found(result, "epsilon-at-zero-snr").severity == "error"
    assert found(result, "epsilon-at-zero-snr").fix is None
    with pytest.raises(
        ValueError, match=r"No change of the scheduler .*epsilon-at-zero-snr.*zsnr_diffusers\.training"
    ):
        result.fixed_scheduler()
    as_v = audit(config, prediction_type="v_prediction")
    assert "prediction-type" in names(as_v)
    assert [*misses(as_v.fixed_scheduler())] == []
    kept = audit(config, prediction_type="epsilon").fixed_scheduler()
    assert kept.config.rescale_betas_zero_snr is False
    assert [*misses(kept, zero_snr=False)] == []


# -- faults of samplers that no config of stock mends


def test_multistep_samplers_noise_to_nothing_in_float16():
    for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        finding = found(audit(config_of(cls)), "half-precision-noise")
        assert finding.severity == "note"
        assert "in float16 at 9 timesteps from 991 to 999" in finding.what


def test_a_distilled_sampler_that_leaves_noise():
    finding = found(audit(config_of(TCDScheduler)), "leaves-noise")
    assert finding.fix is None
    assert "ZeroSNRLCMScheduler" in finding.remedy
    assert max(audit(config_of(TCDScheduler)).steps_tried) <= 50  # what it was distilled at


class CrashingScheduler(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        if self.num_inference_steps == 7:
            raise IndexError("out of\nrange")
        return super().step(model_output, timestep, sample, **kwargs)


def test_a_crash_is_found_by_running():
    finding = found(audit(CrashingScheduler(**RELEASED)), "crashes")
    assert (finding.severity, finding.steps) == ("note", (7,))
    assert "IndexError: out of range" in finding.what


def test_what_cannot_be_run_is_said():
    finding = found(audit(config_of(CogVideoXDPMScheduler, snr_shift_scale=1.0)), "not-run")
    assert "old_pred_original_sample" in finding.what


def test_a_class_whose_library_is_missing(monkeypatch):
    class DPMSolverSDEScheduler:  # as diffusers stands in for it
        _backends = ("torchsde",)

        def __init__(self, *args, **kwargs):
            raise ImportError("torchsde")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", DPMSolverSDEScheduler)
    config = {**RELEASED, "_class_name": "DPMSolverSDEScheduler", "num_train_timesteps": 1000}
    result = audit(config)
    assert names(result) == {"flag-ignored", "not-run"}
    assert [*misses(result.fixed_scheduler())] == []
    with pytest.raises(ValueError, match="num_train_timesteps and beta_schedule is missing"):
        audit({"_class_name": "DPMSolverSDEScheduler"})


# -- schedulers and pipelines in memory


def test_what_is_assigned_on_a_config_is_not_saved():
    pipe = tiny_stable_diffusion(DDIMScheduler(**{**RELEASED, "prediction_type": "sample"}))
    pipe.scheduler.config.prediction_type = "v_prediction"
    result = audit(pipe)
    assert found(result, "assigned-config").severity == "error"
    assert result.prediction_type == "v_prediction"  # what is sampled
    assert result.config["prediction_type"] == "sample"  # what is saved
    pipe.scheduler = result.fixed_scheduler()
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert audit(pipe).ok


def test_a_schedule_that_is_replaced_on_the_object_is_not_saved():
    scheduler = DDIMScheduler(**{**RELEASED, "rescale_betas_zero_snr": False})
    scheduler.alphas_cumprod = DDIMScheduler(**RELEASED).alphas_cumprod
    result = audit(scheduler)
    assert found(result, "patched-schedule").severity == "error"
    assert [*misses(result.fixed_scheduler())] == []
    scheduler.alphas_cumprod = torch.linspace(0.99, 0.01, 1000)
    assert found(audit(scheduler), "patched-schedule").fix is None


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_auditing_a_scheduler_leaves_it_and_the_global_generator_as_they_are(cls):
    scheduler = cls.from_config(config_of(cls))
    scheduler.set_timesteps(7)
    before, state = scheduler.timesteps.clone(), torch.get_rng_state()
    audit(scheduler)
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance_rescale_of_a_pipeline():
    pipe = tiny_stable_diffusion()
    assert found(audit(pipe), "guidance-rescale-missing").severity == "note"
    assert audit(pipe).guidance_rescale is None
    assert audit(enable_guidance_rescale(pipe, 0.6)).guidance_rescale == 0.6
    assert "guidance-rescale-missing" not in names(audit(pipe))


def test_clipping_is_wrong_in_latents_and_right_in_pixels():
    clipping = DDIMScheduler(**{**RELEASED, "clip_sample": True})
    assert found(audit(clipping), "clip-in-latents").severity == "note"  # which of the two is not known
    pipe = tiny_stable_diffusion()
    pipe.scheduler = clipping
    result = audit(pipe)
    assert found(result, "clip-in-latents").severity == "error"
    assert result.fixed_scheduler().config.get("clip_sample", False) is False
    pixels = tiny_unconditional()
    pixels.scheduler = clipping
    assert "clip-in-latents" not in names(audit(pixels))
    assert "zsnr_diffusers.training.pixels" in found(audit(tiny_of_pixels(pixels)), "terminal-snr").remedy


def tiny_of_pixels(pipe):
    pipe.scheduler = DDPMScheduler()
    return pipe


# -- folders


@pytest.fixture
def folder(tmp_path):
    tiny_stable_diffusion(flawed_scheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(folder, config=None, index=None):
    """Change the two files of a pipeline's folder."""
    for path, changes in (
        (folder / "scheduler" / "scheduler_config.json", config),
        (folder / "model_index.json", index),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **(changes or {})}))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fix_writes_both_files_with_backups_and_stock_loads_the_result(folder, caplog):
    write(folder, config_of(PNDMScheduler, rescale_betas_zero_snr=True), {"scheduler": ["diffusers", "PNDMScheduler"]})
    before = files(folder)
    after = fix(folder)
    assert after.ok
    assert after.scheduler == "EulerDiscreteScheduler"
    changed = {path for path, content in files(folder).items() if before.get(path) != content}
    config, index = Path("scheduler/scheduler_config.json"), Path("model_index.json")
    assert changed == {config, index, Path(f"{config}.bak"), Path(f"{index}.bak")}
    assert (folder / f"{config}.bak").read_bytes() == before[config]
    assert (folder / f"{index}.bak").read_bytes() == before[index]
    diffusers.utils.logging.enable_propagation()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "scheduler" not in caplog.text.lower()  # what stock says of a config that it does not understand
    assert type(pipe.scheduler) is EulerDiscreteScheduler
    assert [*misses(pipe.scheduler)] == []
    again = files(folder)
    assert fix(folder).ok  # there is nothing left
    assert files(folder) == again
    write(folder, {"timestep_spacing": "leading"})
    assert fix(folder).ok
    assert (folder / f"{config}.bak").read_bytes() == before[config]  # still the first


def test_fix_leaves_what_it_cannot_mend(folder):
    write(folder, {"rescale_betas_zero_snr": True})
    before = files(folder)
    assert fix(folder).verdict == "wrong"
    assert files(folder) == before
    assert fix(folder, prediction_type="epsilon").verdict == "not zero-SNR"
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"] is False


def test_fix_of_a_scheduler_alone(tmp_path):
    DDIMScheduler(**{**RELEASED, "timestep_spacing": "leading"}).save_pretrained(tmp_path)
    assert fix(tmp_path).ok
    assert EulerDiscreteScheduler.load_config(tmp_path)["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("source", ["acme/dark", "missing", DDIMScheduler(**RELEASED)])
def test_only_local_folders_are_mended(source):
    with pytest.raises((ValueError, TypeError)):
        fix(source)


def test_two_files_that_name_two_classes(folder):
    write(folder, config_of(EulerDiscreteScheduler))
    result = audit(folder)
    assert result.scheduler == "DDIMScheduler"  # which is what is loaded
    assert found(result, "class-mismatch").severity == "note"
    assert fix(folder).ok
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert index["scheduler"][1] == config["_class_name"]


def test_what_an_error_needs_goes_before_what_a_note_would_change(folder):
    """The note would name the class that is loaded, which ignores the flag."""
    write(folder, config_of(DDIMScheduler), {"scheduler": ["diffusers", "PNDMScheduler"]})
    assert names(audit(folder)) >= {"flag-ignored", "class-mismatch"}
    assert fix(folder).scheduler == "EulerDiscreteScheduler"
    assert fix(folder).ok


def test_recorded_guidance_rescale_of_a_folder(folder):
    write(folder, config_of(DDIMScheduler), {"_guidance_rescale": 0.7})
    assert audit(folder).guidance_rescale == 0.7
    for wrong in (1.5, "much"):
        write(folder, index={"_guidance_rescale": wrong})
        with pytest.raises(ValueError, match=r"guidance.rescale"):
            audit(folder)


def test_deep_looks_at_the_weights(folder):
    write(folder, config_of(DDIMScheduler))
    result = audit(folder, deep=True, steps=[5], prompts=["a black landscape"])
    assert result.invariance.share > 0.5  # nobody trained it
    assert found(result, "not-trained-there").severity == "error"
    assert result.luminance.n == 8
    assert "terminal invariance" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["luminance"]["n"] == 8
    write(folder, {"prediction_type": "epsilon"})
    assert audit(folder, deep=True, steps=[5]).invariance is None


# -- single files


def test_keys_of_a_checkpoint_that_stock_does_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    result = audit(path)
    assert names(result) >= {"prediction-type", "terminal-snr", "last-timestep-missed"}
    assert found(result, "terminal-snr").severity == "error"
    assert [*misses(result.fixed_scheduler())] == []
    save_file({"x": torch.zeros(1)}, path, metadata={"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"})
    assert names(audit(path)) == names(result)
    save_file({"x": torch.zeros(1)}, path)
    assert audit(path).verdict == "not zero-SNR"


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0notJSON!", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        audit(path)


# -- the Hub

ON_THE_HUB = f"""
import json, sys
from zsnr_diffusers import audit
say = lambda **kwargs: print(json.dumps(audit("acme/dark", **kwargs).to_dict()))
say(revision="{COMMIT}")
say()
for repo, kwargs in (("acme/dark", {{"revision": "nowhere"}}), ("acme/none", {{}})):
    try:
        audit(repo, **kwargs)
    except OSError as error:
        print(str(error))
"""


def test_of_a_hub_repo_two_small_files_are_read(folder, tmp_path):
    requests = []
    with serve({"acme/dark": folder}, requests) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        result = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB], env={**os.environ, **environment}, capture_output=True, text=True
        )
    assert result.returncode == 0, result.stderr
    at_commit, main, *errors = result.stdout.splitlines()
    assert json.loads(main) == json.loads(at_commit)
    assert json.loads(main) == {
        **audit(folder).to_dict(),
        "source": "acme/dark",
        "findings": json.loads(main)["findings"],
    }
    assert [line.split(" is no local")[0] for line in errors] == ["acme/dark", "acme/none"]
    asked = {path.split("/", 4)[-1] for path in requests if path.startswith("acme/dark/resolve")}
    assert asked == {"model_index.json", "scheduler/scheduler_config.json"}
    assert f"acme/dark/resolve/{COMMIT}/scheduler/scheduler_config.json" in requests
    assert not any(path.endswith((".safetensors", ".bin")) for path in requests)


# -- what is none


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "Cannot audit 3: give a pipeline"),
        ({}, ValueError, "names no class; add '_class_name'"),
        ({"_class_name": "UNet2DModel"}, ValueError, "'UNet2DModel' is no scheduler"),
        (config_of(DDIMScheduler, rescale_betas_zero_snr="false"), ValueError, "='false' must be true or false"),
        (config_of(DDIMScheduler, num_train_timesteps=10**9), ValueError, "num_train_timesteps=1000000000 must be"),
        (config_of(DDIMScheduler, beta_schedule="sideways"), ValueError, "sideways"),
        (config_of(DDIMScheduler, prediction_type="flow"), ValueError, "'flow' is not known; choose one of epsilon"),
        (FlowMatchEulerDiscreteScheduler(), ValueError, "FlowMatchEulerDiscreteScheduler has no betas"),
        (config_of(DDPMScheduler, variance_type="learned"), ValueError, "predict a variance"),
        ("/no/such/folder", OSError, "does not exist"),
        ("no such id", OSError, "no local folder"),
    ],
)
def test_what_cannot_be_audited_is_refused_with_the_reason(source, error, message):
    with pytest.raises(error, match=message):
        audit(source)


def test_folders_without_a_scheduler_or_with_broken_files(tmp_path):
    with pytest.raises(OSError, match="holds no scheduler"):
        audit(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "holds a list")):
        (tmp_path / "scheduler_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            audit(tmp_path)
    with pytest.raises(TypeError, match="audit takes no speed; for a Hub id"):
        audit(tmp_path, speed=1)


CLASSES = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "LCMScheduler"]
VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 2000), st.floats(), st.text(max_size=3)),
    st.sampled_from(["trailing", "linspace", "cosine", "sigma_min", "v_prediction", "sde-dpmsolver++"]),
    st.lists(st.floats(0, 1) | st.text(max_size=1), max_size=3),
)
KEYS = sorted({key for name in CLASSES for key in inspect.signature(getattr(diffusers, name).__init__).parameters})
CONFIGS = st.dictionaries(st.sampled_from([key for key in KEYS if key != "self"]), VALUES, max_size=4)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([*CLASSES, "ZeroSNRDDIMScheduler", "Scheduler"]) | VALUES, CONFIGS)
def test_any_config_is_audited_or_refused_in_words(name, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = audit({"_class_name": name, **changes}, steps=(1, 5))
        except ValueError as error:
            assert str(error)  # noqa: PT017
            return
    assert isinstance(result, Audit)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text) == result.to_dict()
    assert f"verdict: {result.verdict}" in str(result)


# -- what it says


def test_the_report_names_every_finding_and_its_remedy():
    result = audit(config_of(DDIMScheduler, timestep_spacing="leading", set_alpha_to_one=False))
    text = str(result)
    for finding in result.findings:
        assert f"{finding.name}: {finding.what}" in text
        assert f"-> {finding.remedy}" in text
    severities = [finding.severity for finding in result.findings]
    assert severities == sorted(severities, key=["error", "not zero-SNR", "note"].index)
    assert "Stable Diffusion      0.004682    0.06826" in text


@pytest.mark.parametrize("planted", PLANTED)
def test_remedies_in_code_can_be_run(planted):
    config, name, _ = PLANTED[planted]
    remedy = found(audit(config, steps=STEPS), name).remedy
    pipe = tiny_unconditional()
    cls = getattr(diffusers, config["_class_name"])
    pipe.scheduler = cls.from_config(config)
    exec(remedy, {**vars(diffusers), "pipe": pipe})
    assert name not in names(audit(pipe.scheduler, steps=STEPS))


def test_a_scheduler_of_ours_in_a_stock_pipeline_is_right():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(ZeroSNRDDIMScheduler(**SD)), 0.7)
    assert audit(pipe).findings == ()
    assert BETAS["beta_end"] == audit(pipe).config["beta_end"]

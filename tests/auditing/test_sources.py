import inspect
import json
import os
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from audited import config_of, found, misses, names
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from hub_server import COMMIT, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_checkpoints import EPSILON, KINDS, V, sd_scheduler, tiny_pipeline, write_file

from zsnr_diffusers import ZeroSNRMultistepScheduler, audit, save_pipeline
from zsnr_diffusers.auditing import Audit
from zsnr_diffusers.cli import main


# -- single files
def test_keys_of_a_checkpoint_that_stock_does_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    result = audit(path)
    assert result.verdict == "OK"
    left = found(result, "schedule-left-behind")
    assert left.severity == "note"
    assert f"zsnr_diffusers.load_pipeline({str(path)!r})" in left.remedy
    assert (result.scheduler, result.prediction_type, result.terminal_snr) == ("ZeroSNRDDIMScheduler", V, 0)
    assert [*misses(result.fixed_scheduler())] == []
    save_file({"x": torch.zeros(1)}, path, metadata={"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"})
    assert names(audit(path)) == names(result)
    save_file({"x": torch.zeros(1)}, path)
    assert audit(path).verdict == "works as published; not zero-SNR"
    assert not {"schedule-left-behind", "schedule-not-said"} & names(audit(path))
    told = audit(path, prediction_type=V, zero_snr=True)  # which no reader of the file finds
    assert names(told) >= {"schedule-left-behind", "prediction-type", "terminal-snr", "last-timestep-missed"}
    remedy = found(told, "schedule-left-behind").remedy
    assert remedy.endswith(f"zsnr convert {path} FOLDER --prediction_type {V} --zero_snr")
    assert told.verdict == "misconfigured"


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [(EPSILON, False), (V, False), (V, True)])
def test_a_file_that_was_written_here_is_right_or_as_published(kind, model, tmp_path):
    path = save_pipeline(tiny_pipeline(kind, sd_scheduler(*model)), tmp_path / "model.safetensors")
    result = audit(path)
    assert result.verdict == ("OK" if model == (V, True) else "works as published; not zero-SNR"), str(result)
    assert (result.prediction_type, result.terminal_snr == 0) == model
    assert result.pipeline == ("StableDiffusionXLPipeline" if kind == "xl" else "StableDiffusionPipeline")
    assert ("schedule-left-behind" in names(result)) == (model[0] == V)


@pytest.mark.full
def test_a_file_of_2_that_says_nothing_is_not_audited_as_epsilon(tmp_path, capsys):
    path = write_file(tmp_path / "model.safetensors", "2")
    with pytest.raises(
        ValueError, match=r"does not record its prediction type, and Stable Diffusion 2\.x exists with both"
    ):
        audit(path)
    assert main(["audit", str(path)]) == 2
    assert "pass --prediction_type v_prediction (2.0" in capsys.readouterr().err
    assert audit(path, prediction_type=EPSILON).prediction_type == V  # by diffusers, whatever the file is
    assert "prediction-type" in names(audit(path, prediction_type=EPSILON))
    assert audit(path, prediction_type=V).verdict == "misconfigured"  # until the file says it


PUBLISHED = {
    "1.5 and 2.1 base": config_of(PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=False, prediction_type=EPSILON),
    "2.1": config_of(DDIMScheduler, set_alpha_to_one=False, clip_sample=False, prediction_type=V),
    "XL": config_of(EulerDiscreteScheduler, prediction_type=EPSILON),
}


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_work_as_published(name):
    config = {**PUBLISHED[name], "rescale_betas_zero_snr": False, "timestep_spacing": "leading", "steps_offset": 1}
    result = audit(config)
    assert result.verdict == "works as published; not zero-SNR"
    assert not result.ok
    assert not [finding for finding in result.findings if finding.severity == "error"]
    assert audit(config, prediction_type="sample").verdict == "misconfigured"


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0notJSON!", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
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


@pytest.mark.full
def test_of_a_hub_repo_two_small_files_are_read(folder, tmp_path):
    requests = []
    with serve({"acme/dark": folder}, requests=requests) as endpoint:
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
    assert [line.split(" is not a local")[0] for line in errors] == ["acme/dark", "acme/none"]
    asked = {path.split("/", 4)[-1] for path in requests if path.startswith("acme/dark/resolve")}
    assert asked == {"model_index.json", "scheduler/scheduler_config.json"}
    assert f"acme/dark/resolve/{COMMIT}/scheduler/scheduler_config.json" in requests
    assert not any(path.endswith((".safetensors", ".bin")) for path in requests)


# -- what is none
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "Cannot audit 3: pass a pipeline"),
        ({}, ValueError, "names no class; add '_class_name'"),
        ({"_class_name": "UNet2DModel"}, ValueError, "'UNet2DModel' is no scheduler"),
        (config_of(DDIMScheduler, rescale_betas_zero_snr="false"), ValueError, "='false' must be true or false"),
        (config_of(DDIMScheduler, num_train_timesteps=10**9), ValueError, "num_train_timesteps=1000000000 must be"),
        (config_of(DDIMScheduler, beta_schedule="sideways"), ValueError, "sideways"),
        (config_of(DDIMScheduler, prediction_type="flow"), ValueError, "'flow' is unknown; choose one of epsilon"),
        (EDMEulerScheduler(), ValueError, "EDMEulerScheduler has no betas"),
        (config_of(DDPMScheduler, variance_type="learned"), ValueError, "predict a variance"),
        ("/no/such/folder", OSError, "does not exist"),
        ("no such id", OSError, "not a local folder"),
    ],
)
def test_what_cannot_be_audited_is_refused_with_the_reason(source, error, message):
    with pytest.raises(error, match=message):
        audit(source)


def test_folders_without_a_scheduler_or_with_broken_files(tmp_path):
    with pytest.raises(OSError, match="has no scheduler"):
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


@pytest.mark.full
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


@pytest.mark.full
def test_our_own_spacing_is_audited_as_it_runs():
    """The config says `trailing` for diffusers' classes, which do not know `kappa`."""
    scheduler = ZeroSNRMultistepScheduler(prediction_type="v_prediction")
    assert audit(scheduler).timestep_spacing == "kappa"
    assert audit(json.loads(scheduler.to_json_string())).timestep_spacing == "kappa"
    assert audit(diffusers.EulerDiscreteScheduler.from_config(scheduler.config)).timestep_spacing == "trailing"

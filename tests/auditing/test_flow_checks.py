"""Audits of flow-matching models: what stock's schedulers make of them is found by running these."""

import json

import diffusers
import pytest
import torch
from audited import found, names, stock_flow_findings
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import zsnr_diffusers
from zsnr_diffusers import FlowMatchEulerScheduler, FlowMatchMultistepScheduler, audit
from zsnr_diffusers.auditing import fix
from zsnr_diffusers.auditing.flow_subject import share_of_last_step
from zsnr_diffusers.cli import main
from zsnr_diffusers.core.flow import kappa_times, trailing_times

SD_3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
"""The scheduler config of Stable Diffusion 3."""

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LINE = "pipe.scheduler = zsnr_diffusers.FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)"


def of_pipeline(folder, config, pipeline, library="diffusers"):
    """A folder with the two files that an audit reads."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, "scheduler": [library, config["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_shift_of_stable_diffusion_3_is_applied_twice_and_the_last_step_wasted():
    result = audit(SD_3)
    assert names(result) == {"double-shift", "wasted-last-step"}
    assert result.verdict == "works as published; wastes steps"
    assert not result.ok
    twice, wasted = found(result, "double-shift"), found(result, "wasted-last-step")
    assert "100 steps end at 0.008929, which is 0.002994 before one shift, instead of 0.001" in twice.what
    assert "the last of 5 steps starts at sigma 0.008929" in wasted.what
    assert {2, 4, 5} <= set(wasted.steps)
    assert twice.remedy == wasted.remedy == LINE


def test_the_numbers_are_those_that_stock_returns():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    result = audit(scheduler)
    scheduler.set_timesteps(4)
    assert result.setup.flow_times_by_steps[4] == pytest.approx(scheduler.sigmas.tolist())
    assert result.setup.flow_times_by_steps[4] == pytest.approx([1, 0.8577, 0.6022, 0.0089, 0], abs=1e-4)


@pytest.mark.parametrize("n", [2, 7, 20, 50])
def test_what_a_last_step_does_is_measured_on_the_way_that_a_network_leads(n):
    assert share_of_last_step([*kappa_times(n), 0.0]) == pytest.approx(1, abs=1e-6)
    assert share_of_last_step([*trailing_times(n), 0.0]) > 0.8
    assert share_of_last_step([*trailing_times(n)[:-1], 1e-3, 0.0]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("cls", [FlowMatchMultistepScheduler, FlowMatchEulerScheduler])
@pytest.mark.parametrize(
    "config",
    [SD_3, {**SD_3, "use_dynamic_shifting": True}, {**SD_3, "invert_sigmas": True}, {**SD_3, "shift_terminal": 0.1}],
    ids=["SD 3", "dynamic", "inverted", "terminal"],
)
def test_under_our_schedulers_a_config_passes_clean(config, cls):
    result = audit(cls.from_config(config))
    assert result.findings == ()
    assert (result.terminal_snr, result.final_alpha, result.verdict) == (0, 1, "OK")


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "QwenImagePipeline"])
@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_pipelines_that_pass_sigmas_get_even_steps_of_stock(pipeline, shift, tmp_path):
    result = audit(of_pipeline(tmp_path / "model", {**SD_3, **shift}, pipeline))
    assert result.findings == ()
    assert "passed by the pipeline sigmas" in str(result)


def test_pipelines_that_pass_a_number_do_not(tmp_path):
    result = audit(of_pipeline(tmp_path / "model", SD_3, "StableDiffusion3Pipeline"))
    assert "double-shift" in names(result)
    dynamic = audit(of_pipeline(tmp_path / "other", {**SD_3, "use_dynamic_shifting": True}, "WanPipeline"))
    assert names(dynamic) == {"wasted-last-step"}


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_distilled_models_are_not_told_to_change_their_spacing(scheduler):
    assert audit(scheduler).findings == ()


def test_models_without_a_shift_may_be_distilled():
    result = audit(FlowMatchEulerDiscreteScheduler())
    assert result.ok
    finding = found(result, "wasted-last-step")
    assert finding.severity == "note"
    assert f"if the model was not distilled:\n{LINE}" in finding.remedy
    assert "if it was:\n" in finding.remedy
    assert "timestep_spacing='trailing'" in finding.remedy


def test_where_stock_has_no_number():
    finding = found(audit({**SD_3, "shift_terminal": 0.1}), "broken-sigmas")
    assert (finding.severity, finding.steps) == ("note", (1,))
    assert finding.what == "sigmas: is NaN at n = 1"


class Repeating(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
        super().set_timesteps(num_inference_steps, device, **kwargs)
        if num_inference_steps == 20:
            self.sigmas[2] = self.sigmas[1]
        elif num_inference_steps == 7:
            self.sigmas, self.timesteps = self.sigmas[1:], self.timesteps[1:]
            self.sigmas[0] = 1.0


def test_repeated_and_dropped_sigmas_are_found_by_looking():
    Repeating.__name__ = "FlowMatchRepeatingScheduler"
    finding = found(audit(Repeating(shift=3.0)), "broken-sigmas")
    assert (finding.severity, finding.steps) == ("error", (7, 20))
    assert "are more or fewer than requested at n = 7" in finding.what
    assert "repeat or increase at n = 20" in finding.what


def test_heun_visits_its_flow_times_twice_and_that_is_no_fault():
    result = audit(FlowMatchHeunDiscreteScheduler(shift=3.0))
    assert names(result) == {"double-shift", "wasted-last-step"}


@pytest.mark.full
def test_stock_s_multistep_samplers_over_flow_times():
    assert names(audit(UniPCMultistepScheduler(**FLOW, flow_shift=3.0))) == stock_flow_findings(flow_shift=3.0)
    dpm = audit(DPMSolverMultistepScheduler(**FLOW))
    assert names(dpm) == {"cut-timesteps", "first-step-below-noise"}
    assert "the first sigma is 0.999 and not 1" in found(dpm, "first-step-below-noise").what
    deis = audit(DEISMultistepScheduler(**FLOW))
    assert found(deis, "leaves-noise").severity == "error"
    assert deis.verdict == "misconfigured"


def test_a_first_step_far_from_noise_is_an_error():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.config["use_karras_sigmas"] = False
    assert "first-step-below-noise" not in names(audit(scheduler))

    class FlowMatchLateScheduler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, n=None, device=None, **kwargs):
            super().set_timesteps(n, device, **kwargs)
            self.sigmas[0] = 0.97

    finding = found(audit(FlowMatchLateScheduler(shift=3.0)), "first-step-below-noise")
    assert finding.severity == "error"


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(**FLOW, flow_shift=3.0, final_sigmas_type="sigma_min"),
        DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
        DEISMultistepScheduler(**FLOW, flow_shift=3.0),
    ],
    ids=["UniPC", "DPM++", "DEIS"],
)
def test_what_stock_can_do_right_is_fixed_with_stock(scheduler):
    before = audit(scheduler)
    assert found(before, "leaves-noise").fix is not None
    fixed = before.fixed_scheduler()
    assert type(fixed).__module__.startswith("diffusers.")
    assert audit(fixed).ok
    assert fixed.config["flow_shift"] == scheduler.config["flow_shift"]


@pytest.mark.full
def test_fix_writes_what_stock_can_do_and_leaves_the_rest(tmp_path):
    config = {"_class_name": "DEISMultistepScheduler", **FLOW, "flow_shift": 3.0}
    folder = of_pipeline(tmp_path / "deis", config, "WanPipeline")
    assert fix(folder).ok
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (written["_class_name"], written["flow_shift"]) == ("UniPCMultistepScheduler", 3.0)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"][1] == "UniPCMultistepScheduler"
    folder = of_pipeline(tmp_path / "sd3", SD_3, "StableDiffusion3Pipeline")
    assert not fix(folder).ok
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == SD_3
    assert not [*folder.rglob("*.bak")]


@pytest.mark.full
@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_stable_diffusion_cannot_run_stock_s_flow_scheduler(pipeline, tmp_path):
    folder = of_pipeline(tmp_path / "model", SD_3, pipeline)
    result = audit(folder)
    finding = found(result, "not-offered")
    assert finding.severity == "error"
    assert ("add_noise" if "Img2Img" in pipeline else "init_noise_sigma") in finding.what
    assert finding.remedy == LINE
    after = fix(folder)
    assert (after.scheduler, after.ok) == ("UniPCMultistepScheduler", True)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["flow_shift"], config["prediction_type"]) == (3.0, "flow_prediction")
    assert "shift" not in config


def test_image_to_image_of_stable_diffusion_3_asks_what_unipc_does_not_have(tmp_path):
    config = {"_class_name": "UniPCMultistepScheduler", **FLOW, "flow_shift": 3.0}
    finding = found(audit(of_pipeline(tmp_path / "m", config, "StableDiffusion3Img2ImgPipeline")), "not-offered")
    assert "scale_noise" in finding.what
    assert finding.fix is None


@pytest.mark.full
def test_a_scheduler_with_betas_under_a_flow_model():
    config = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    result = audit(config, prediction_type="flow_prediction")
    finding = found(result, "betas-for-flow")
    assert "prediction_type='flow_prediction')" in finding.remedy
    assert type(result.fixed_scheduler()) is UniPCMultistepScheduler
    pipe_scheduler = EulerDiscreteScheduler.from_config(config)
    scope = {"pipe": type("Pipe", (), {"scheduler": pipe_scheduler}), "zsnr_diffusers": zsnr_diffusers}
    exec(finding.remedy, scope)
    assert audit(scope["pipe"].scheduler).findings == ()


def test_a_model_of_v_in_flow_time_is_an_error():
    finding = found(audit(SD_3, prediction_type="v_prediction"), "prediction-type")
    assert "ZeroSNRMultistepScheduler(prediction_type='v_prediction'" in finding.remedy


def test_noise_is_no_prediction_where_the_sample_is_the_noise():
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True)  # whose default is epsilon
    finding = found(audit(scheduler), "epsilon-in-flow-time")
    assert finding.remedy.endswith("from_config(pipe.scheduler.config, prediction_type='flow_prediction')")
    assert finding.fix is None  # no config tells what a network was trained for
    told = audit(scheduler, prediction_type="flow_prediction")
    assert found(told, "prediction-type").fix == {"prediction_type": "flow_prediction"}
    assert told.fixed().ok


@pytest.mark.skipif(not hasattr(diffusers, "HeliosScheduler"), reason="of newer diffusers")
def test_schedulers_of_one_pipeline_are_said_not_to_be_run():
    result = audit({"_class_name": "HeliosScheduler"})
    assert names(result) == {"not-run"}


@pytest.mark.full
def test_the_exact_network_of_a_wide_gaussian_is_run_too():
    runs = audit(FlowMatchMultistepScheduler()).setup.simulations
    assert all(run.wide is not None and torch.tensor(run.wide).isfinite() for run in runs)


def test_the_command_prints_the_line_and_draws_the_steps(tmp_path, capsys):
    folder = of_pipeline(tmp_path / "model", SD_3, "StableDiffusion3Pipeline")
    plot, report = tmp_path / "plot.png", tmp_path / "report.json"
    assert main(["audit", str(folder), "--plot", str(plot), "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert LINE in out
    assert "verdict: works as published; wastes steps" in out
    assert plot.stat().st_size > 0
    assert json.loads(report.read_text())["verdict"] == "works as published; wastes steps"
    ours = of_pipeline(tmp_path / "ours", {**SD_3, "_class_name": "FlowMatchMultistepScheduler"}, "FluxPipeline")
    assert main(["audit", str(ours)]) == 0

import diffusers
import pytest
from audited import RELEASED, config_of, found, misses, names
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from zsnr_diffusers import audit


@pytest.mark.full
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

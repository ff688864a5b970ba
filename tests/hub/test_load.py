"""Pipelines out of folders, with a scheduler that does what the folder says of the model."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from tiny_checkpoints import V, says, sd_scheduler, settings

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler, load_pipeline


@pytest.mark.full
@pytest.mark.parametrize(
    "scheduler",
    [
        sd_scheduler(),
        sd_scheduler(V),
        sd_scheduler(V, zero_snr=True),
        DPMSolverMultistepScheduler.from_config(sd_scheduler(V, zero_snr=True).config, timestep_spacing="linspace"),
        EulerDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config),
        PNDMScheduler.from_config(sd_scheduler(V).config),
        ZeroSNRMultistepScheduler(prediction_type=V),
        ZeroSNRMultistepScheduler(rescale_betas_zero_snr=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_is_right_stays(scheduler, config_of, said):
    """As stock loads it; and one that is given stays whatever it is."""
    folder = config_of("1", scheduler)
    loaded = load_pipeline(folder).scheduler
    assert type(loaded) is type(scheduler)
    assert settings(loaded) == settings(scheduler)
    mine = HeunDiscreteScheduler(steps_offset=1)
    assert load_pipeline(folder, scheduler=mine).scheduler is mine
    assert said("WARNING") == []


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler.from_config(sd_scheduler(V, zero_snr=True).config, timestep_spacing="leading"),
        HeunDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config),
    ],
    ids=["never at the last timestep", "ignores the flag"],
)
def test_a_scheduler_that_does_not_do_what_it_says_is_replaced(scheduler, config_of):
    loaded = load_pipeline(config_of("1", scheduler)).scheduler
    assert type(loaded) is ZeroSNRDDIMScheduler
    assert loaded.alphas_cumprod[-1] == 0
    loaded.set_timesteps(7)
    assert loaded.timesteps[0] == 999
    assert loaded.config["beta_start"] == scheduler.config["beta_start"]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", [V, "epsilon"])
def test_zero_snr_that_is_in_the_betas_needs_no_flag(prediction_type, spacing, config_of):
    """No flag says it, and the leading steps miss the only timestep that starts from noise."""
    betas = sd_scheduler(V, zero_snr=True).betas.tolist()
    changes = {"trained_betas": betas, "timestep_spacing": spacing}
    scheduler = DDIMScheduler.from_config(sd_scheduler(prediction_type).config, **changes)
    assert scheduler.alphas_cumprod[-1] == 0
    loaded = load_pipeline(config_of("1", scheduler)).scheduler
    if (prediction_type, spacing) != (V, "leading"):  # epsilon at zero SNR is left as it was saved
        assert settings(loaded) == settings(scheduler)
        assert type(loaded) is DDIMScheduler
        return
    assert type(loaded) is ZeroSNRDDIMScheduler
    assert loaded.config["rescale_betas_zero_snr"] is True
    torch.testing.assert_close(loaded.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)  # its float32
    for n in (1, 7, 50):
        loaded.set_timesteps(n)
        assert loaded.timesteps[0] == 999


def test_the_caller_knows_better_than_a_folder(configs, config_of):
    told = load_pipeline(configs["1"], prediction_type=V)
    assert type(told.scheduler) is DDIMScheduler
    assert says(told) == (V, False)
    ours = config_of("1", ZeroSNRMultistepScheduler(rescale_betas_zero_snr=False, timestep_spacing="leading"))
    told = load_pipeline(ours, prediction_type=V, rescale_betas_zero_snr=True)
    assert type(told.scheduler) is ZeroSNRMultistepScheduler
    assert says(told) == (V, True)
    assert told.scheduler.config["timestep_spacing"] == "trailing"
    with pytest.raises(ValueError, match="Pass either scheduler, or prediction_type"):
        load_pipeline(configs["1"], prediction_type=V, scheduler=sd_scheduler())


def test_what_has_no_betas_is_not_told(config_of):
    folder = config_of("1", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no scheduler with betas"):
        load_pipeline(folder, prediction_type=V)

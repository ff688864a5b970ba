import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRMultistepScheduler, schedulers
from zsnr_diffusers.core.noise import has_zero_terminal_snr
from zsnr_diffusers.schedulers.by_name import (
    SHORT_NAMES,
    check_scheduler_names,
    reference_scheduler,
    scheduler_by_name,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = EulerDiscreteScheduler(
    **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
).config
FLAWED = DDIMScheduler(**SD, clip_sample=False).config
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0).config


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_short_name_is_its_class_for_the_model(name):
    class_name, settings = SHORT_NAMES[name]
    scheduler = scheduler_by_name(name, ZERO)
    assert type(scheduler).__name__ == class_name
    assert {key: scheduler.config[key] for key in settings} == settings
    assert scheduler.config["prediction_type"] == "v_prediction"
    scheduler.set_timesteps(10)
    assert float(scheduler.timesteps[0]) >= 998


@pytest.mark.parametrize("name", ["zsnr", "zsnr_ddim", "ddim", "ddpm", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("config", [ZERO, FLAWED], ids=["zero", "flawed"])
def test_zero_snr_is_what_the_model_has(name, config):
    scheduler = scheduler_by_name(name, config)
    assert has_zero_terminal_snr(scheduler.alphas_cumprod) or scheduler.alphas_cumprod[-1] < 1e-7 or config is FLAWED
    assert bool(scheduler.config["rescale_betas_zero_snr"]) is (config is ZERO)


def test_no_latent_is_clipped_that_the_model_does_not_clip():
    assert scheduler_by_name("ddim", ZERO).config["clip_sample"] is False
    assert scheduler_by_name("ddim", DDIMScheduler(clip_sample=True).config).config["clip_sample"] is True


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("zsnr", "FlowMatchMultistepScheduler"),
        ("zsnr_ddim", "FlowMatchEulerScheduler"),
        ("euler", "FlowMatchEulerDiscreteScheduler"),
        ("heun", "FlowMatchHeunDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_what_a_name_means_for_a_flow_model(name, class_name):
    scheduler = scheduler_by_name(name, FLOW)
    assert type(scheduler).__name__ == class_name
    assert scheduler.config.get("flow_shift", scheduler.config.get("shift")) == 3.0
    assert float(scheduler.init_noise_sigma) == 1.0


def test_of_many_steps_along_the_ode():
    ours = {ZeroSNRMultistepScheduler: (ZERO, FLAWED), FlowMatchMultistepScheduler: (FLOW,)}
    for config, cls in ((config, cls) for cls, configs in ours.items() for config in configs):
        scheduler = reference_scheduler(config)
        assert type(scheduler) is cls
        assert (scheduler.config["solver_order"], scheduler.config["timestep_spacing"]) == (3, "trailing")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("FlowMatchHeunDiscreteScheduler", ZERO, "samples flow-matching models, but this model has betas"),
        ("ddim", FLOW, "DDIMScheduler does not sample flow-matching models"),
        ("ZeroSNRDDIMScheduler", FLOW, "ZeroSNRDDIMScheduler does not sample flow-matching models"),
        ("dpmpp_2m_karras", FLOW, "Karras spacing of DPMSolverMultistepScheduler would replace the flow"),
        ("dpm++", ZERO, "unknown scheduler dpm.* Short names are zsnr, "),
    ],
)
def test_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        scheduler_by_name(name, config)


def test_every_class_goes_by_its_name():
    stock = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    assert len(stock) > 30
    check_scheduler_names([*stock, *(name for name in schedulers.__all__ if name != "SchedulerMixin")])

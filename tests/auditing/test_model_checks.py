import json
import re

import pytest
import torch
from audited import RELEASED, STEPS, config_of, found, misses, names
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from small_stable_diffusion import flawed_scheduler
from starts import quiet, strong_start
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import audit, enable_guidance_rescale, enable_start, save_pipeline


# -- what no config tells
@pytest.mark.full
def test_a_v_model_without_zero_snr_is_mended_only_if_it_is_said_to_be_trained_there():
    config = config_of(DDIMScheduler, rescale_betas_zero_snr=False)
    result = audit(config)
    assert result.verdict == "works as published; not zero-SNR"
    terminal = found(result, "terminal-snr")
    assert terminal.fix is None
    assert "rescale_betas_zero_snr=True" in terminal.remedy
    assert "zsnr_diffusers.training" in terminal.remedy
    assert result.fixed_scheduler().config.rescale_betas_zero_snr is False
    told = audit(config, zero_snr=True)
    assert told.verdict == "misconfigured"
    assert [*misses(told.fixed_scheduler())] == []
    assert audit(told.fixed_scheduler()).ok
    assert audit(config_of(DDIMScheduler), zero_snr=False).fixed_scheduler().config.rescale_betas_zero_snr is False


@pytest.mark.full
def test_an_epsilon_model_is_sent_to_training_and_never_gets_the_flag():
    config = json.loads(flawed_scheduler().to_json_string())
    result = audit(config)
    terminal = found(result, "terminal-snr")
    assert (terminal.severity, terminal.fix) == ("not zero-SNR", None)
    assert "accelerate launch -m zsnr_diffusers.training --pretrained_model_name_or_path" in terminal.remedy
    scheduler = result.fixed_scheduler()  # the rest is fixed
    assert scheduler.config.rescale_betas_zero_snr is False
    assert scheduler.config.prediction_type == "epsilon"
    assert [*misses(scheduler, zero_snr=False)] == []
    assert names(audit(scheduler)) == {"terminal-snr", "extra-timestep"}
    assert found(audit(DDPMScheduler(), zero_snr=True), "terminal-snr").fix is None


def test_an_epsilon_model_that_is_not_to_be_trained_is_offered_a_start(tmp_path):
    pipe = quiet("1.5")
    pipe.save_pretrained(tmp_path / "saved")
    remedy = found(audit(tmp_path / "saved", steps=STEPS), "terminal-snr").remedy
    assert f"\nzsnr fit-start {tmp_path / 'saved'} --train_data_dir IMAGES --output start.safetensors" in remedy
    assert "zsnr fit-start PIPELINE" in found(audit(pipe, steps=STEPS), "terminal-snr").remedy
    for without in (flawed_scheduler(), DDIMPipeline(tiny_unconditional().unet, flawed_scheduler())):
        assert "fit-start" not in found(audit(without, steps=STEPS), "terminal-snr").remedy
    enable_start(pipe, strong_start(pipe))
    save_pipeline(pipe, tmp_path / "started")
    for source in (pipe, tmp_path / "started"):
        finding = found(audit(source, steps=STEPS), "terminal-snr")
        assert "its start adds the signal that the network expects there" in finding.what
        assert "fit-start" not in finding.remedy


def test_the_cosine_schedule_is_nearly_zero_and_not_zero():
    """Models of epsilon are trained on it, and stock's stand-in for zero is above it."""
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    result = audit(config_of(DDIMScheduler, **cosine), steps=STEPS)
    assert result.terminal_alpha == pytest.approx(4.928e-05, rel=1e-3)
    assert result.verdict == "works as published; not zero-SNR"
    assert "epsilon-at-zero-snr" not in names(result)
    flagged = {**cosine, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert "flag-ignored" in names(audit(config_of(PNDMScheduler, **flagged), steps=STEPS))
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        assert audit(config_of(cls, **flagged), steps=STEPS).ok


@pytest.mark.full
def test_epsilon_at_zero_snr_is_mended_only_if_it_is_said_what_the_network_predicts():
    config = config_of(DDIMScheduler, prediction_type="epsilon")
    result = audit(config)
    assert found(result, "epsilon-at-zero-snr").severity == "error"
    assert found(result, "epsilon-at-zero-snr").fix is None
    with pytest.raises(ValueError, match=r"Changing the scheduler .*epsilon-at-zero-snr.*zsnr_diffusers\.training"):
        result.fixed_scheduler()
    as_v = audit(config, prediction_type="v_prediction")
    assert "prediction-type" in names(as_v)
    assert [*misses(as_v.fixed_scheduler())] == []
    kept = audit(config, prediction_type="epsilon").fixed_scheduler()
    assert kept.config.rescale_betas_zero_snr is False
    assert [*misses(kept, zero_snr=False)] == []


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


@pytest.mark.full
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


@pytest.mark.full
def test_guidance_rescale_of_a_pipeline():
    pipe = tiny_stable_diffusion()
    assert found(audit(pipe), "guidance-rescale-missing").severity == "note"
    assert audit(pipe).guidance_rescale is None
    assert audit(enable_guidance_rescale(pipe, 0.6)).guidance_rescale == 0.6
    assert "guidance-rescale-missing" not in names(audit(pipe))
    result = audit(enable_guidance_rescale(pipe, 0.0, keep_low_frequencies=2))
    assert (result.guidance_rescale, result.keep_low_frequencies) == (0.0, 2)
    assert "guidance-rescale-missing" not in names(result)
    assert re.search(r"frequencies kept +the lowest 2 x 2", str(result))


@pytest.mark.full
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

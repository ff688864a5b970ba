"""Rectified-flow Stable Diffusion: UNets that predict noise - x_0, in stock pipelines with our flow schedulers."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from small_pipelines import PIPELINES
from third_parties import PIPELINE_WARNINGS

from zsnr_diffusers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    disable_guidance_rescale,
    enable_guidance_rescale,
)

pytestmark = PIPELINE_WARNINGS

FROM_NOISE = (
    "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetPipeline",
)
FROM_IMAGES = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
CLASSES = (FlowMatchMultistepScheduler, FlowMatchEulerScheduler)
POINT = 0.7


def build(name, scheduler):
    pipe = PIPELINES[name].build()
    pipe.scheduler = scheduler
    return pipe


def generate(name, pipe, n, **changes):
    return pipe(**{**PIPELINES[name].arguments(), "num_inference_steps": n, **changes}).images


def watch(pipe):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    return seen


def know_the_point(pipe):
    """Let the network answer as for data that is one point, whatever it is told besides."""

    def forward(x, timestep, *args, return_dict=True, **condition):
        velocity = ((x.double() - POINT) / (float(timestep) / 1000)).to(x.dtype)
        return SimpleNamespace(sample=velocity) if return_dict else (velocity,)

    pipe.unet.forward = forward


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", [*FROM_NOISE, *FROM_IMAGES])
def test_stock_pipelines_call_the_network_once_for_each_step(name, cls):
    pipe = build(name, cls())
    seen = watch(pipe)
    strength = {"strength": 1.0} if name in FROM_IMAGES else {}
    for n in (1, 4, 10):
        seen.clear()
        images = generate(name, pipe, n, **strength)
        assert bool(images.isfinite().all())
        assert seen == pipe.scheduler.timesteps.tolist()
        assert (len(seen), seen[0]) == (n, 1000)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", FROM_NOISE)
def test_the_exact_denoiser_of_a_point_leads_to_it(name, cls):
    pipe = build(name, cls())
    know_the_point(pipe)
    for n in (1, 4, 10):
        latents = generate(name, pipe, n)
        torch.testing.assert_close(latents, torch.full_like(latents, POINT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_and_from_the_middle_of_an_image(name, cls):
    """Outside the mask the picture stays, so it is the masked half that is looked at."""
    pipe = build(name, cls())
    know_the_point(pipe)
    for n, strength in ((4, 0.5), (10, 0.7), (10, 1.0)):
        seen = watch(pipe)
        latents = generate(name, pipe, n, strength=strength)
        assert seen == pipe.scheduler.timesteps[n - int(n * strength) :].tolist()
        found = latents[..., latents.shape[-1] // 2 :] if "Inpaint" in name else latents
        torch.testing.assert_close(found, torch.full_like(found, POINT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_an_image_is_noised_to_the_level_that_the_network_is_told(name):
    pipe, inputs = build(name, FlowMatchMultistepScheduler()), []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append((args[0].chunk(2)[1], float(args[1]))))
    latents = torch.full((1, 4, 8, 8), 3.0)
    generate(name, pipe, 10, strength=0.5, image=latents)
    x, timestep = inputs[0]
    s = timestep / 1000
    noise = (x - (1 - s) * 3.0) / s
    assert abs(float(noise.mean())) < 0.25  # of 256 values
    assert abs(float(noise.std()) - 1) < 0.15


def test_xl_hands_over_from_base_to_refiner_at_a_share_of_the_flow_times():
    base = build("StableDiffusionXLPipeline", FlowMatchMultistepScheduler())
    refiner = build("StableDiffusionXLImg2ImgPipeline", FlowMatchMultistepScheduler())
    first, second = watch(base), watch(refiner)
    half = generate("StableDiffusionXLPipeline", base, 10, denoising_end=0.5)
    generate("StableDiffusionXLImg2ImgPipeline", refiner, 10, denoising_start=0.5, image=half)
    assert [*first, *second] == base.scheduler.timesteps.tolist()
    assert min(first) >= 500 > max(second)


@pytest.mark.parametrize("space", ["output", "v", "epsilon", "x_0"])
@pytest.mark.parametrize("name", [*FROM_NOISE, *FROM_IMAGES])
def test_guidance_is_rescaled_in_every_space(name, space):
    pipe = build(name, FlowMatchMultistepScheduler())
    plain = generate(name, pipe, 4)
    rescaled = generate(name, enable_guidance_rescale(pipe, 0.7, space=space, strict=True), 4)
    assert bool(rescaled.isfinite().all())
    assert not torch.equal(rescaled, plain)
    assert torch.equal(generate(name, disable_guidance_rescale(pipe), 4), plain)


def test_output_space_is_the_rescale_of_stock():
    stock = build("StableDiffusionPipeline", FlowMatchMultistepScheduler())
    ours = enable_guidance_rescale(build("StableDiffusionPipeline", FlowMatchMultistepScheduler()), 0.7)
    expected = generate("StableDiffusionPipeline", stock, 4, guidance_rescale=0.7)
    torch.testing.assert_close(generate("StableDiffusionPipeline", ours, 4), expected, rtol=1e-4, atol=1e-4)


def test_stocks_own_flow_scheduler_cannot_be_run_there():
    pipe = build("StableDiffusionPipeline", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(AttributeError, match="init_noise_sigma"):
        generate("StableDiffusionPipeline", pipe, 4)


@pytest.mark.parametrize("cls", CLASSES)
def test_betas_of_the_base_are_left_out_where_the_caller_says_so(cls):
    config = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="epsilon").config
    with pytest.raises(ValueError, match="pass prediction_type='flow_prediction'"):
        cls.from_config(config)
    scheduler = cls.from_config(config, prediction_type="flow_prediction")
    assert scheduler.config == cls().config

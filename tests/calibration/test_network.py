"""The plain function of (x_t, t) against the pipeline that it was recorded of."""

import pytest
import torch
from calibrations import pipeline
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from tiny_pipelines import IMAGE, RIGHT_HALF

from zsnr_diffusers import ZeroSNRMultistepScheduler, enable_guidance_rescale
from zsnr_diffusers.calibration import calibrate
from zsnr_diffusers.calibration.network import Guidance, record_guided_network
from zsnr_diffusers.calibration.trajectory import sample_in_steps

SEEDS = [3, 4, 5]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd", "xl", "classes"])
@pytest.mark.parametrize("guidance", [(1.0,), (6.0,), (6.0, 0.7), (6.0, 0.7, 2)])
def test_it_leads_to_the_latents_of_the_pipeline(kind, guidance):
    pipe, conditions = pipeline(kind)
    enable_guidance_rescale(pipe, 0.0)
    guidance = Guidance(*guidance).call_kwargs(pipe)
    network = record_guided_network(pipe, conditions, SEEDS, batch_size=2, **guidance)
    assert (len(network), network.num_batches) == (3, 2)
    found = sample_in_steps(network, ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config), 4)
    name = "class_labels" if kind == "classes" else "prompt"
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    call = {name: conditions, "generator": generators, "num_inference_steps": 4, "output_type": "latent", **guidance}
    torch.testing.assert_close(found, pipe(**call).images, rtol=1e-4, atol=1e-4)  # other sizes of batches


def test_low_frequencies_that_a_pipeline_does_not_know_are_refused():
    pipe, conditions = pipeline("sd")
    with pytest.raises(ValueError, match=r"enable_guidance_rescale\(pipe, 0.7, keep_low_frequencies=2\)"):
        record_guided_network(
            pipe, conditions, SEEDS, guidance_scale=6.0, guidance_rescale=0.7, keep_low_frequencies=2
        )


def test_calls_are_timed_one_by_one():
    pipe, conditions = pipeline("sd")
    network = record_guided_network(pipe, conditions, SEEDS, guidance_scale=2.0)
    before = network.calls
    seconds = network.time_calls(2)
    assert network.calls - before == len(seconds) == 2
    assert min(seconds) > 0


def test_the_pipeline_is_left_as_it_was():
    pipe, conditions = pipeline("sd")
    scheduler, before = pipe.scheduler, dict(vars(pipe.unet))
    record_guided_network(pipe, conditions, SEEDS, guidance_scale=2.0)
    assert pipe.scheduler is scheduler
    assert not pipe.unet._forward_pre_hooks
    assert vars(pipe.unet).keys() == before.keys()


def test_what_the_pipeline_rescales_by_default_does_not_stand_in_for_0():
    pipe, conditions = pipeline("sd")
    plain = record_guided_network(pipe, conditions, SEEDS, guidance_scale=6.0)
    enable_guidance_rescale(pipe, 0.7)
    again = record_guided_network(pipe, conditions, SEEDS, guidance_scale=6.0)
    assert torch.equal(plain(plain.noise, 500), again(again.noise, 500))
    rescaled = record_guided_network(pipe, conditions, SEEDS, guidance_scale=6.0, guidance_rescale=0.7)
    assert not torch.allclose(plain(plain.noise, 500), rescaled(plain.noise, 500), rtol=1e-2)
    enable_guidance_rescale(pipe, 0.0, keep_low_frequencies=2)
    again = record_guided_network(pipe, conditions, SEEDS, guidance_scale=6.0)
    assert torch.equal(plain(plain.noise, 500), again(again.noise, 500))


def test_negative_prompts_and_sizes_are_those_of_the_call():
    pipe, conditions = pipeline("sd")
    networks = [
        record_guided_network(pipe, conditions, SEEDS, guidance_scale=6.0, **call)
        for call in ({}, {"negative_prompt": "fog"}, {"height": 128, "width": 64})
    ]
    plain, negative, tall = networks
    assert not torch.equal(plain(plain.noise, 500), negative(plain.noise, 500))
    assert tall.noise.shape[-2:] == (16, 8)


def refused(pipe, message, conditions=("a", "b"), **call):
    with pytest.raises(ValueError, match=message):
        record_guided_network(pipe, [*conditions], [0, 1], **{"guidance_scale": 3.0, **call})


def test_a_controlnet_is_refused():
    pipe, _ = pipeline("sd")
    control = ControlNetModel.from_unet(pipe.unet)
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    message = "passes down_block_additional_residuals to its UNet.*calibrate a text-to-image pipeline"
    refused(controlled, message, image=IMAGE)


def test_an_inpainting_network_is_refused():
    pipe, _ = pipeline("sd")
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    inpainting = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    inpainting.set_progress_bar_config(disable=True)
    call = {"image": IMAGE, "mask_image": RIGHT_HALF, "height": 64, "width": 64}
    refused(inpainting, "passes 9 channels to its UNet", **call)


def test_other_schedules_and_networks_are_refused():
    pipe, _ = pipeline("sd")
    flow = pipeline("sd")[0]
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    refused(flow, r"has no UNet with a variance-preserving schedule \(flow-matching models have none\)")
    del pipe.unet
    pipe.unet = None
    refused(pipe, "has no UNet with a variance-preserving schedule")


def test_a_guider_and_another_space_are_refused():
    guiders = pytest.importorskip("diffusers.guiders")
    for settings in ({"guider": guiders.AdaptiveProjectedGuidance(5.0)}, {"guidance_rescale": 0.7, "space": "x_0"}):
        pipe, _ = pipeline("sd")
        enable_guidance_rescale(pipe, **settings)
        refused(pipe, "uses a guider, or guidance rescale in another space")


def test_a_pipeline_that_guides_in_another_way_is_refused(monkeypatch):
    from zsnr_diffusers.calibration import network as module

    pipe, _ = pipeline("sd")
    monkeypatch.setattr(module, "guided_prediction", lambda u, c, w, *_: u + 1.5 * w * (c - u))
    refused(pipe, "does not use .*predictions differ by")


def test_an_epsilon_model_is_refused_with_what_to_do():
    pipe, _ = pipeline("sd")
    pipe.scheduler = DDIMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot be used at zero"):
        calibrate(pipe, [str(i) for i in range(8)], guidance_scale=3.0)

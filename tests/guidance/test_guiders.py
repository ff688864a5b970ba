"""diffusers' guiders in the place of a pipeline's own combination."""

import logging

import diffusers.guiders as guiders
import pytest
import torch
from guided_pipelines import by_hand, generate, watched_calls
from small_pipelines import PIPELINES
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import (
    GuidanceError,
    ZeroSNRDDIMScheduler,
    disable_guidance_rescale,
    enable_guidance_rescale,
    rescale_guidance,
)

MAKE = {
    "ClassifierFreeGuidance": {"guidance_scale": 5.0},
    "AdaptiveProjectedGuidance": {"guidance_scale": 5.0, "adaptive_projected_guidance_momentum": -0.5},
    "ClassifierFreeZeroStarGuidance": {"guidance_scale": 5.0, "zero_init_steps": 0},
    "TangentialClassifierFreeGuidance": {"guidance_scale": 5.0},
    "FrequencyDecoupledGuidance": {"guidance_scales": [6.0, 3.0]},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 1},
}
GUIDERS = [name for name in MAKE if hasattr(guiders, name)]
TASKS = {
    "text": "StableDiffusionPipeline",
    "image": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "control": "StableDiffusionControlNetPipeline",
}


def make(name, **changes):
    return getattr(guiders, name)(**{**MAKE.get(name, {}), **changes})


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("task", TASKS)
def test_equals_the_guider_called_by_hand(name, task):
    small = PIPELINES[TASKS[task]]
    pipe = enable_guidance_rescale(small.build(), guider=make(name), strict=True)
    seen, timesteps = watched_calls(pipe), []
    pipe.unet.register_forward_pre_hook(lambda module, args: timesteps.append(args[1]))
    pipe(**small.arguments())
    reference, own = make(name), 0
    assert len(timesteps) >= 2
    for step, (output, got, t) in enumerate(zip(seen["unet"], seen["scheduler"], timesteps, strict=True)):
        unconditional, conditional = output.chunk(2)
        assert torch.equal(got, by_hand(reference, step, len(timesteps), t, conditional, unconditional))
        own += torch.allclose(got, unconditional + 7.5 * (conditional - unconditional), atol=1e-4)
    assert own == 0


def test_there_are_five_at_least():
    assert len(GUIDERS) >= 5


def test_only_the_guider_s_scale_counts():
    guider = make("ClassifierFreeGuidance", guidance_scale=3.0)
    ours = generate(tiny_stable_diffusion_with(guider), guidance_scale=9.0)
    torch.testing.assert_close(ours, generate(tiny_stable_diffusion(), guidance_scale=3.0), rtol=1e-5, atol=1e-5)


def tiny_stable_diffusion_with(guider, phi=None, **kwargs):
    return enable_guidance_rescale(tiny_stable_diffusion(), phi, guider=guider, **kwargs)


@pytest.mark.full
def test_a_guider_for_one_call():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.0)
    stock = generate(pipe)
    guided = generate(pipe, guider=make("AdaptiveProjectedGuidance"))
    assert torch.equal(guided, generate(tiny_stable_diffusion_with(make("AdaptiveProjectedGuidance"))))
    assert torch.equal(generate(pipe), stock)
    assert not torch.equal(guided, stock)
    disabled = disable_guidance_rescale(tiny_stable_diffusion_with(make("AdaptiveProjectedGuidance")))
    assert torch.equal(generate(disabled), stock)


def test_an_interval():
    """Guidance off at the first and the last quarter of the steps: there the scheduler gets the conditional."""
    pipe = tiny_stable_diffusion_with(make("ClassifierFreeGuidance", start=0.25, stop=0.75))
    seen = watched_calls(pipe)
    generate(pipe, num_inference_steps=8)
    conditional = [torch.equal(g, o.chunk(2)[1]) for g, o in zip(seen["scheduler"], seen["unet"], strict=True)]
    assert conditional == [True, True, False, False, False, False, True, True]


def test_rescale_acts_on_what_the_guider_made():
    pipe = tiny_stable_diffusion_with(make("ClassifierFreeGuidance"), 0.7)
    seen = watched_calls(pipe)
    generate(pipe)
    for got, output in zip(seen["scheduler"], seen["unet"], strict=True):
        u, c = output.chunk(2)
        torch.testing.assert_close(got, rescale_guidance(u + 5.0 * (c - u), c, 0.7), rtol=1e-5, atol=1e-5)
    own = generate(tiny_stable_diffusion_with(make("ClassifierFreeGuidance", guidance_rescale=0.7)))
    ours = generate(tiny_stable_diffusion_with(make("ClassifierFreeGuidance"), 0.7))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


def test_rescale_in_both_is_refused_before_anything_runs():
    guider = make("ClassifierFreeGuidance", guidance_rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0.5 and the pipeline 0.7"):
        tiny_stable_diffusion_with(guider, 0.7)
    with pytest.raises(ValueError, match="rescale twice"):
        generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), guider=guider)
    assert bool(generate(tiny_stable_diffusion_with(guider)).isfinite().all())


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("PerturbedAttentionGuidance", {"perturbed_guidance_layers": [0]}, "pred_cond_skip"),
        ("SkipLayerGuidance", {"skip_layer_guidance_layers": [0]}, "pred_cond_skip"),
        ("SmoothedEnergyGuidance", {"seg_guidance_layers": [0]}, "pred_cond_seg"),
        ("AutoGuidance", {"auto_guidance_layers": [0], "dropout": 0.1}, "an additional forward pass"),
    ],
)
def test_guiders_that_need_another_forward_pass_are_refused(name, kwargs, reason):
    with pytest.raises(TypeError, match=f"{name} .*{reason}"):
        tiny_stable_diffusion_with(make(name, **kwargs))


def test_what_is_no_guider_is_refused():
    with pytest.raises(TypeError, match="guider='apg' does not have the interface"):
        tiny_stable_diffusion_with("apg")


def test_a_pipeline_that_combines_three_predictions_keeps_its_own_combination():
    small = PIPELINES["StableDiffusionInstructPix2PixPipeline"]
    stock = small.build()(**small.arguments()).images
    pipe = enable_guidance_rescale(small.build(), guider=make("ClassifierFreeGuidance"))
    assert torch.equal(pipe(**small.arguments()).images, stock)
    with pytest.raises(GuidanceError, match="combines 3 predictions"):
        enable_guidance_rescale(small.build(), guider=make("ClassifierFreeGuidance"), strict=True)(**small.arguments())


@pytest.mark.full
def test_zero_init_and_zero_snr_contradict_each_other(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("zsnr_diffusers"), "propagate", True)
    v = {"prediction_type": "v_prediction"}

    def warned(scheduler, **changes):
        caplog.clear()
        pipe = enable_guidance_rescale(
            tiny_stable_diffusion(scheduler), guider=make("ClassifierFreeZeroStarGuidance", **changes)
        )
        generate(pipe)
        generate(pipe)
        return [record for record in caplog.records if "zero_init_steps=0" in record.getMessage()]

    assert len(warned(ZeroSNRDDIMScheduler(**v), zero_init_steps=1)) == 1
    assert not warned(ZeroSNRDDIMScheduler(**v), zero_init_steps=0)
    assert not warned(ZeroSNRDDIMScheduler(**v, rescale_betas_zero_snr=False), zero_init_steps=1)


def test_half_precision():
    pipe = tiny_stable_diffusion_with(make("AdaptiveProjectedGuidance"), 0.7).to(torch.bfloat16)
    latents = generate(pipe)
    assert latents.dtype == torch.bfloat16
    assert bool(latents.isfinite().all())


def test_equal_predictions_go_through_the_guider_too():
    """With the prompt as its own negative, nothing tells the two apart; CFG-Zero* still begins with zero."""
    pipe = tiny_stable_diffusion_with(make("ClassifierFreeZeroStarGuidance", zero_init_steps=1), strict=True)
    seen = watched_calls(pipe)
    generate(pipe, negative_prompt="a dark landscape")
    assert not seen["scheduler"][0].any()
    assert seen["scheduler"][1].any()

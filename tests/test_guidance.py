import json

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import (
    GuidanceRescaleMixin,
    ZeroSNRDDIMScheduler,
    ZeroSNRStableDiffusionImg2ImgPipeline,
    ZeroSNRStableDiffusionPipeline,
    disable_guidance_rescale,
    enable_guidance_rescale,
)
from zsnr_diffusers.core import classifier_free_guidance, rescale_guidance

PICTURE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def paint(pipe, **kwargs):
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "output_type": "latent",
        "num_images_per_prompt": 2,
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    }
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        arguments |= {"image": PICTURE, "strength": 1.0}
    return pipe("a dark landscape", **(arguments | kwargs)).images


def doors(pipe):
    """What goes through the doors of denoiser and scheduler while the pipeline runs."""
    seen = {"unet": [], "scheduler": []}
    pipe.unet.register_forward_hook(lambda module, args, output: seen["unet"].append(output[0]), prepend=True)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: (
        seen["scheduler"].append(output),
        step(output, *args, **kwargs),
    )[1]
    return seen


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_equals_stock_text_to_image(phi):
    expected = paint(tiny_stable_diffusion(), guidance_rescale=phi)
    torch.testing.assert_close(
        paint(enable_guidance_rescale(tiny_stable_diffusion(), phi)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_at_zero_and_after_disabling_the_pipeline_is_stock_bit_for_bit(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    stock = paint(pipe)
    assert not torch.equal(paint(enable_guidance_rescale(pipe)), stock)
    assert torch.equal(paint(pipe, guidance_rescale=0.0), stock)
    assert torch.equal(paint(enable_guidance_rescale(pipe, 0.0)), stock)
    before = set(vars(pipe)) - {"default_guidance_rescale"}
    enable_guidance_rescale(pipe)
    disable_guidance_rescale(pipe)
    assert type(pipe) is cls
    assert set(vars(pipe)) == before
    assert torch.equal(paint(pipe), stock)


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_what_reaches_the_scheduler_is_algorithm_2(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    seen = doors(enable_guidance_rescale(pipe, 0.7))
    paint(pipe)
    assert len(seen["unet"]) == len(seen["scheduler"]) == 4
    for output, stepped in zip(seen["unet"], seen["scheduler"], strict=True):
        unconditional, conditional = output.chunk(2)
        expected = rescale_guidance(classifier_free_guidance(unconditional, conditional, 7.5), conditional, 0.7)
        torch.testing.assert_close(stepped, expected, rtol=1e-6, atol=1e-6)


def test_stock_s_own_argument_is_not_applied_on_top():
    once = paint(enable_guidance_rescale(tiny_stable_diffusion(), 0.7))
    both = paint(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), guidance_rescale=0.7)
    assert torch.equal(once, both)


def test_a_flat_prediction_does_not_turn_the_picture_into_nan():
    """What an ideal zero-SNR model returns for a plain picture; stock's own rescale is 0 / 0 there."""
    pipe = tiny_stable_diffusion()
    for parameter in pipe.unet.parameters():
        torch.nn.init.zeros_(parameter)
    assert bool(paint(pipe, guidance_rescale=0.7).isnan().any())
    assert bool(paint(enable_guidance_rescale(pipe, 0.7)).isfinite().all())


def test_without_guidance_nothing_changes():
    stock = paint(tiny_stable_diffusion(), guidance_scale=1.0)
    assert torch.equal(paint(enable_guidance_rescale(tiny_stable_diffusion()), guidance_scale=1.0), stock)


def test_denoiser_is_left_alone_outside_a_call_and_after_an_exception():
    pipe = enable_guidance_rescale(tiny_stable_diffusion())
    assert not pipe.unet._forward_hooks

    def explode(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        paint(pipe, callback_on_step_end=explode)
    assert not pipe.unet._forward_hooks


def test_callback_may_change_the_guidance_scale():
    def lower(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0
        return tensors

    stock = paint(tiny_stable_diffusion(), guidance_rescale=0.7, callback_on_step_end=lower)
    ours = paint(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), callback_on_step_end=lower)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_enabling_twice_is_enabling_once():
    pipe = enable_guidance_rescale(enable_guidance_rescale(tiny_stable_diffusion(), 0.2), 0.7)
    torch.testing.assert_close(paint(pipe), paint(tiny_stable_diffusion(), guidance_rescale=0.7), rtol=1e-5, atol=1e-5)
    assert type(disable_guidance_rescale(pipe)) is StableDiffusionPipeline


def test_subclass_of_a_ready_pipeline_rescales_once():
    class Mine(ZeroSNRStableDiffusionPipeline):
        pass

    pipe = Mine(**tiny_stable_diffusion().components, requires_safety_checker=False)
    torch.testing.assert_close(paint(pipe), paint(tiny_stable_diffusion(), guidance_rescale=0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [ZeroSNRStableDiffusionPipeline, ZeroSNRStableDiffusionImg2ImgPipeline])
def test_ready_pipelines_rescale_by_default_and_are_saved_as_stock(cls, tmp_path):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    stock_cls = cls.__mro__[2]
    expected = paint(enable_guidance_rescale(stock_cls(**pipe.components, requires_safety_checker=False), 0.7))
    assert torch.equal(paint(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == stock_cls.__name__
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is stock_cls
    stock = paint(stock_cls(**pipe.components, requires_safety_checker=False))
    assert torch.equal(paint(disable_guidance_rescale(pipe)), stock)
    assert torch.equal(paint(cls.from_pretrained(tmp_path)), expected)


def test_enabled_pipeline_is_saved_under_its_own_name(tmp_path):
    enable_guidance_rescale(tiny_stable_diffusion()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_signature_and_documentation_stay_stock_s():
    import inspect

    ours = inspect.signature(ZeroSNRStableDiffusionPipeline.__call__).parameters
    assert list(ours) == list(inspect.signature(StableDiffusionPipeline.__call__).parameters)


@pytest.mark.parametrize("phi", [-0.1, 1.5])
def test_strength_outside_the_unit_interval_is_refused(phi):
    with pytest.raises(ValueError, match=f"guidance_rescale={phi}"):
        enable_guidance_rescale(tiny_stable_diffusion(), phi)
    with pytest.raises(ValueError, match=f"guidance_rescale={phi}"):
        paint(enable_guidance_rescale(tiny_stable_diffusion()), guidance_rescale=phi)


def test_pipelines_that_do_not_guide_with_two_predictions_are_refused():
    with pytest.raises(TypeError, match="DDIMPipeline has no classifier-free guidance"):
        enable_guidance_rescale(tiny_unconditional())
    with pytest.raises(TypeError, match="guides with three predictions"):

        class Three(GuidanceRescaleMixin, StableDiffusionInstructPix2PixPipeline):
            pass

    with pytest.raises(TypeError, match="no UNet"):
        enable_guidance_rescale(object())


def test_half_precision():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(ZeroSNRDDIMScheduler(prediction_type="v_prediction")))
    latents = paint(pipe.to(torch.bfloat16))
    assert latents.dtype == torch.bfloat16
    assert bool(latents.isfinite().all())

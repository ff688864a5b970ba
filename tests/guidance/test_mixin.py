import inspect
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from guided_pipelines import generate, watched_calls
from published_models import in_memory
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional, watch

from zsnr_diffusers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    GuidanceRescaleMixin,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRStableDiffusionImg2ImgPipeline,
    ZeroSNRStableDiffusionPipeline,
    disable_guidance_rescale,
    enable_guidance_rescale,
    load_pipeline,
)
from zsnr_diffusers.core import NoiseLevel, classifier_free_guidance, rescale_guidance
from zsnr_diffusers.core.guidance import rescale_guidance_in_space


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_equals_stock_text_to_image(phi):
    expected = generate(tiny_stable_diffusion(), guidance_rescale=phi)
    torch.testing.assert_close(
        generate(enable_guidance_rescale(tiny_stable_diffusion(), phi)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_at_zero_and_after_disabling_the_pipeline_is_stock_bit_for_bit(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    stock = generate(pipe)
    before = set(vars(pipe))
    assert not torch.equal(generate(enable_guidance_rescale(pipe)), stock)
    assert torch.equal(generate(pipe, guidance_rescale=0.0), stock)
    assert torch.equal(generate(enable_guidance_rescale(pipe, 0.0)), stock)
    disable_guidance_rescale(pipe)
    assert type(pipe) is cls
    assert set(vars(pipe)) == before
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_what_reaches_the_scheduler_is_algorithm_2(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    seen = watched_calls(enable_guidance_rescale(pipe, 0.7))
    generate(pipe)
    assert len(seen["unet"]) == len(seen["scheduler"]) == 4
    for output, stepped in zip(seen["unet"], seen["scheduler"], strict=True):
        unconditional, conditional = output.chunk(2)
        expected = rescale_guidance(classifier_free_guidance(unconditional, conditional, 7.5), conditional, 0.7)
        torch.testing.assert_close(stepped, expected, rtol=1e-6, atol=1e-6)


def test_stock_s_own_argument_is_not_applied_on_top():
    once = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7))
    both = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), guidance_rescale=0.7)
    assert torch.equal(once, both)


def test_a_flat_prediction_does_not_turn_the_picture_into_nan():
    """What an ideal zero-SNR model returns for a plain image; stock's own rescale is 0 / 0 there."""
    pipe = tiny_stable_diffusion()
    for parameter in pipe.unet.parameters():
        torch.nn.init.zeros_(parameter)
    assert bool(generate(pipe, guidance_rescale=0.7).isnan().any())
    assert bool(generate(enable_guidance_rescale(pipe, 0.7)).isfinite().all())


def test_without_guidance_nothing_changes():
    stock = generate(tiny_stable_diffusion(), guidance_scale=1.0)
    assert torch.equal(generate(enable_guidance_rescale(tiny_stable_diffusion()), guidance_scale=1.0), stock)


def test_callback_may_change_the_guidance_scale():
    def lower(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0
        return tensors

    stock = generate(tiny_stable_diffusion(), guidance_rescale=0.7, callback_on_step_end=lower)
    ours = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), callback_on_step_end=lower)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_enabling_twice_is_enabling_once():
    pipe = enable_guidance_rescale(enable_guidance_rescale(tiny_stable_diffusion(), 0.2), 0.7)
    torch.testing.assert_close(
        generate(pipe), generate(tiny_stable_diffusion(), guidance_rescale=0.7), rtol=1e-5, atol=1e-5
    )
    assert type(disable_guidance_rescale(pipe)) is StableDiffusionPipeline


def test_subclass_of_a_ready_pipeline_rescales_once():
    class Mine(ZeroSNRStableDiffusionPipeline):
        default_keep_low_frequencies = 0

    pipe = Mine(**tiny_stable_diffusion().components, requires_safety_checker=False)
    torch.testing.assert_close(
        generate(pipe), generate(tiny_stable_diffusion(), guidance_rescale=0.7), rtol=1e-5, atol=1e-5
    )


@pytest.mark.full
@pytest.mark.parametrize("cls", [ZeroSNRStableDiffusionPipeline, ZeroSNRStableDiffusionImg2ImgPipeline])
def test_ready_pipelines_rescale_by_default_and_are_saved_as_stock(cls, tmp_path):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    stock_cls, k = cls.__mro__[2], cls.default_keep_low_frequencies
    expected = stock_cls(**pipe.components, requires_safety_checker=False)
    expected = generate(enable_guidance_rescale(expected, 0.7, keep_low_frequencies=k))
    assert torch.equal(generate(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == stock_cls.__name__
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is stock_cls
    stock = generate(stock_cls(**pipe.components, requires_safety_checker=False))
    assert torch.equal(generate(disable_guidance_rescale(pipe)), stock)
    assert torch.equal(generate(in_memory(cls.from_pretrained(tmp_path))), expected)


def test_enabled_pipeline_is_saved_under_its_own_name(tmp_path):
    enable_guidance_rescale(tiny_stable_diffusion()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_signature_shows_what_a_call_takes_beside_stock_s_arguments():
    for cls in (ZeroSNRStableDiffusionPipeline, ZeroSNRStableDiffusionImg2ImgPipeline):
        ours = [*inspect.signature(cls.__call__).parameters]
        stock = [*inspect.signature(cls.__mro__[2].__call__).parameters]
        assert {*ours} == {*stock, "guidance_rescale", "keep_low_frequencies", "guider"}
        assert [name for name in ours if name in stock] == stock
        assert cls.__call__.__doc__ == cls.__mro__[2].__call__.__doc__


@pytest.mark.parametrize("phi", [-0.1, 1.5])
def test_strength_outside_the_unit_interval_is_refused(phi):
    with pytest.raises(ValueError, match=f"guidance_rescale={phi}"):
        enable_guidance_rescale(tiny_stable_diffusion(), phi)
    with pytest.raises(ValueError, match=f"guidance_rescale={phi}"):
        generate(enable_guidance_rescale(tiny_stable_diffusion()), guidance_rescale=phi)


def test_pipelines_without_guidance_or_without_a_unet_are_refused():
    with pytest.raises(TypeError, match="DDIMPipeline has no classifier-free guidance"):
        enable_guidance_rescale(tiny_unconditional())
    with pytest.raises(TypeError, match="Unguided has no classifier-free guidance"):

        class Unguided(GuidanceRescaleMixin, DDPMPipeline):
            pass

    with pytest.raises(TypeError, match="object has neither a UNet"):
        enable_guidance_rescale(object())


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="space='latent' is unknown"):
        enable_guidance_rescale(tiny_stable_diffusion(), space="latent")


def test_half_precision():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(ZeroSNRDDIMScheduler(prediction_type="v_prediction")))
    latents = generate(pipe.to(torch.bfloat16))
    assert latents.dtype == torch.bfloat16
    assert bool(latents.isfinite().all())


# In other spaces, with schedulers that hold a sample and its noise level in forms of their own

V = {"prediction_type": "v_prediction"}
SCHEDULERS = [
    ZeroSNRDDIMScheduler(**V),
    ZeroSNRMultistepScheduler(**V),
    DDIMScheduler(**V, clip_sample=False, steps_offset=1),
    EulerDiscreteScheduler(**V, steps_offset=1),
    DPMSolverMultistepScheduler(**V, steps_offset=1),
    DDIMScheduler(prediction_type="epsilon", clip_sample=False, steps_offset=1),
    EulerDiscreteScheduler(prediction_type="epsilon", steps_offset=1, use_karras_sigmas=True),
]


@pytest.mark.parametrize("space", ["v", "epsilon", "x_0"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: f"{type(s).__name__}-{s.config.prediction_type}")
def test_in_another_space_the_scheduler_gets_algorithm_2_there(scheduler, space):
    """x_t and its level are read off the network's input and the scheduler's betas here, not off the scheduler."""
    pipe = tiny_stable_diffusion(type(scheduler).from_config(scheduler.config))
    seen = watched_calls(enable_guidance_rescale(pipe, 0.7, space=space))
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append((args[0].chunk(2)[1], float(args[1]))))
    generate(pipe)
    for output, stepped, (x_t, t) in zip(seen["unet"], seen["scheduler"], inputs, strict=True):
        unconditional, conditional = output.chunk(2)
        alpha_bar = float(np.interp(t, range(1000), pipe.scheduler.alphas_cumprod.double()))
        if getattr(
            pipe.scheduler.config, "use_karras_sigmas", False
        ):  # t is rounded to the nearest level in log sigma
            sigmas = (
                ((1 - pipe.scheduler.alphas_cumprod.double()) / pipe.scheduler.alphas_cumprod.double()).sqrt().log()
            )
            alpha_bar = 1 / (1 + np.exp(2 * np.interp(t, range(1000), sigmas)))
        expected = rescale_guidance_in_space(
            classifier_free_guidance(unconditional, conditional, 7.5),
            conditional,
            0.7,
            space=space,
            prediction_type=pipe.scheduler.config.prediction_type,
            x_t=x_t,
            level=NoiseLevel(alpha_bar**0.5, (1 - alpha_bar) ** 0.5),
        )
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)  # float32 levels near pure noise


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS = [
    FlowMatchMultistepScheduler(),
    FlowMatchEulerScheduler(shift=3.0),
    UniPCMultistepScheduler(**FLOW, steps_offset=1),
    DPMSolverMultistepScheduler(**FLOW, steps_offset=1),
]


def rescaled_by_definition(space, x_t, s, guided, conditional):
    """Algorithm 2 on x_0 = x_s - s v, or on noise = x_s + (1 - s) v, and back."""
    there = {"x_0": lambda v: x_t - s * v, "epsilon": lambda v: x_t + (1 - s) * v}[space]
    g, c = there(guided), there(conditional)
    g = g + 0.7 * (c.std((1, 2, 3), keepdim=True) / g.std((1, 2, 3), keepdim=True) - 1) * g
    return (x_t - g) / s if space == "x_0" else (g - x_t) / (1 - s)


@pytest.mark.full
@pytest.mark.parametrize("space", ["x_0", "epsilon"])
@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=lambda s: type(s).__name__)
def test_in_flow_time_other_spaces_are_those_of_its_levels(scheduler, space):
    pipe = tiny_stable_diffusion(type(scheduler).from_config(scheduler.config))
    seen = watched_calls(enable_guidance_rescale(pipe, 0.7, space=space))
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].chunk(2)[1].double()))
    generate(pipe)
    levels = pipe.scheduler.sigmas.double().tolist()
    for output, stepped, x_t, s in zip(seen["unet"], seen["scheduler"], inputs, levels, strict=False):
        unconditional, conditional = output.double().chunk(2)
        guided = classifier_free_guidance(unconditional, conditional, 7.5)
        assert bool(stepped.isfinite().all())
        if space == "x_0" or s < 0.99:  # at pure noise the other has a limit
            expected = rescaled_by_definition(space, x_t, s, guided, conditional)
            torch.testing.assert_close(stepped.double(), expected, rtol=1e-4, atol=1e-4)


def test_another_space_needs_a_scheduler_that_tells_noise_levels():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(EDMEulerScheduler()), 0.7, space="v")
    called = watch(pipe.unet)
    with pytest.raises(ValueError, match="has neither a variance-preserving schedule nor flow times"):
        generate(pipe)
    assert not called


# What is saved


@pytest.mark.full
@pytest.mark.parametrize("space", [pytest.param("output", marks=pytest.mark.slow), "v"])
def test_phi_travels_with_the_pipeline(space, tmp_path, caplog):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.4, space=space)
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_guidance_rescale"] == 0.4
    for load in (load_pipeline, ZeroSNRStableDiffusionPipeline.from_pretrained):
        assert torch.equal(generate(in_memory(load(tmp_path))), expected)
        torch.testing.assert_close(
            generate(in_memory(load(tmp_path, guidance_rescale=0.9))),
            generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.9, space=space)),
        )
        assert torch.equal(
            generate(in_memory(load(tmp_path, guidance_rescale=0.0))), generate(tiny_stable_diffusion())
        )
    with caplog.at_level("WARNING"):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        stock = DiffusionPipeline.from_pretrained(tmp_path)
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "guidance" in record.getMessage()]
    assert torch.equal(generate(in_memory(stock)), generate(tiny_stable_diffusion()))


def test_nothing_is_recorded_of_a_pipeline_that_does_not_rescale(tmp_path):
    pipe = disable_guidance_rescale(enable_guidance_rescale(tiny_stable_diffusion()))
    pipe.save_pretrained(tmp_path)
    assert "_guidance_rescale" not in json.loads((tmp_path / "model_index.json").read_text())
    assert load_pipeline(tmp_path).__class__ is StableDiffusionPipeline


@pytest.mark.full
def test_other_tasks_from_the_same_components():
    pipe = enable_guidance_rescale(tiny_stable_diffusion())
    ready = ZeroSNRStableDiffusionPipeline.from_pipe(pipe)
    for image in (
        ZeroSNRStableDiffusionImg2ImgPipeline.from_pipe(pipe),
        ZeroSNRStableDiffusionImg2ImgPipeline.from_pipe(ready),
        enable_guidance_rescale(AutoPipelineForImage2Image.from_pipe(pipe)),
    ):
        assert image.unet is pipe.unet
        assert not torch.equal(generate(image), generate(image, guidance_rescale=0.0))


def test_a_class_of_one_s_own_keeps_its_name(tmp_path):
    class Mine(StableDiffusionPipeline):
        pass

    pipe = enable_guidance_rescale(Mine(**tiny_stable_diffusion().components, requires_safety_checker=False))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Mine"


@pytest.mark.parametrize("load", [load_pipeline, ZeroSNRStableDiffusionPipeline.from_pretrained])
def test_what_cannot_be_applied_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="guidance_rescale=7 must lie in"):  # before anything is looked for
        load(tmp_path / "nowhere", guidance_rescale=7)
    tiny_stable_diffusion().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for value in (7, -0.1, "much", None):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "_guidance_rescale": value}))
        with pytest.raises(ValueError, match=f"guidance_rescale={value!r} must lie in"):
            load(tmp_path)


def test_what_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(OSError, match="has no pipeline: there is no model_index"):
        load_pipeline(tmp_path)

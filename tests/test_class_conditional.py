import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from guided_pipelines import clean
from PIL import Image
from tiny_class_conditional import V, build, generate_classes
from tiny_pipelines import seeded, tiny_unconditional, zero_snr_scheduler

import zsnr_diffusers
from zsnr_diffusers import ClassConditionalPipeline, enable_guidance_rescale, load_pipeline, rescale_guidance
from zsnr_diffusers.core import dynamic_threshold
from zsnr_diffusers.evaluation import generate_images


def recorded_calls(pipe):
    """Inputs and outputs of the network, and what the scheduler is given."""
    seen = []
    pipe.unet.register_forward_hook(
        lambda module, args, output: seen.append({"x": args[0], "labels": args[2], "output": output.sample}),
        prepend=True,
    )
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: (seen[-1].update(got=output), step(output, *args, **kwargs))[
        1
    ]
    return seen


def test_guides_from_no_class_to_the_class():
    pipe = build()
    seen = recorded_calls(pipe)
    images = generate_classes(pipe)
    assert images.shape == (2, 3, 8, 8)
    assert len(seen) == 4
    for call in seen:
        assert call["labels"].tolist() == [3, 3, 0, 2]
        assert torch.equal(*call["x"].chunk(2))
        u, c = call["output"].chunk(2)
        assert torch.equal(call["got"], u + 3.0 * (c - u))


def test_without_guidance_the_network_sees_each_picture_once():
    pipe = build()
    seen = recorded_calls(pipe)
    generate_classes(pipe, guidance_scale=1.0)
    assert [call["labels"].tolist() for call in seen] == [[0, 2]] * 4


def test_rescale():
    pipe = build()
    seen = recorded_calls(pipe)
    generate_classes(pipe, guidance_rescale=0.7)
    for call in seen:
        u, c = call["output"].chunk(2)
        torch.testing.assert_close(call["got"], rescale_guidance(u + 3.0 * (c - u), c, 0.7), rtol=1e-6, atol=1e-6)
    assert torch.equal(
        generate_classes(enable_guidance_rescale(build(), 0.7, strict=True)),
        generate_classes(build(), guidance_rescale=0.7),
    )


SCHEDULERS = [getattr(zsnr_diffusers, name) for name in zsnr_diffusers.__all__ if name.endswith("Scheduler")]


@pytest.mark.parametrize(
    "make",
    [cls for cls in SCHEDULERS if "Inverse" not in cls.__name__] + [DDIMScheduler, DDPMScheduler],
    ids=lambda cls: cls.__name__,
)
def test_any_scheduler(make):
    scheduler = make(**V) if make in SCHEDULERS else make.from_config(zero_snr_scheduler().config)
    pipe = build(scheduler)
    images = generate_classes(pipe, guidance_rescale=0.7)
    assert bool(images.isfinite().all())
    assert torch.equal(generate_classes(pipe, guidance_rescale=0.7), images)


# Dynamic thresholding, Imagen's remedy for the same fault


@pytest.mark.parametrize("scheduler", [zsnr_diffusers.ZeroSNRDDIMScheduler(**V), zero_snr_scheduler()])
def test_dynamic_thresholding_acts_on_each_x_0_and_only_in_that_call(scheduler):
    pipe = build(scheduler)
    before, config = generate_classes(pipe), dict(pipe.scheduler.config)
    predicted = []
    step = pipe.scheduler.step

    def watched(output, t, x, **kwargs):
        alpha_bar = pipe.scheduler.alphas_cumprod[t]
        predicted.append(alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * output)
        return step(output, t, x, **kwargs)

    pipe.scheduler.step = watched
    images = generate_classes(pipe, dynamic_thresholding_ratio=0.9)
    del pipe.scheduler.step
    assert images.abs().max() <= 1
    expected = dynamic_threshold(predicted[-1], 0.9, float("inf"))
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(images, predicted[-1].clamp(-1, 1))
    assert dict(pipe.scheduler.config) == config
    assert torch.equal(generate_classes(pipe), before)


def test_thresholding_ends_with_an_exception():
    pipe = build()
    config = dict(pipe.scheduler.config)
    with pytest.raises(ZeroDivisionError):
        generate_classes(pipe, dynamic_thresholding_ratio=0.9, callback_on_step_end=lambda *args: 1 / 0)
    assert dict(pipe.scheduler.config) == config
    assert clean(pipe)


def test_both_remedies_together():
    images = generate_classes(build(), dynamic_thresholding_ratio=0.99, guidance_rescale=0.7)
    assert images.abs().max() <= 1


# What it is called with, and what it returns


def test_outputs():
    pipe = build()
    latent = generate_classes(pipe)
    expected = (latent / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate_classes(pipe, output_type="pt"), expected)
    torch.testing.assert_close(
        torch.from_numpy(generate_classes(pipe, output_type="np")).permute(0, 3, 1, 2), expected
    )
    pictures = generate_classes(pipe, output_type="pil")
    assert [type(picture) for picture in pictures] == [Image.Image] * 2
    assert np.abs(np.asarray(pictures[1]) / 255 - expected[1].permute(1, 2, 0).numpy()).max() < 1 / 255
    (images,) = pipe([0, 2], num_inference_steps=4, generator=seeded(), output_type="latent", return_dict=False)
    assert images.shape == latent.shape


def test_labels_in_all_their_forms():
    pipe = build()
    one = generate_classes(pipe, [1], batch_size=2)
    assert torch.equal(generate_classes(pipe, [1, 1]), one)
    assert torch.equal(pipe(torch.tensor([1, 1]), 2, 4, 3.0, seeded(), output_type="latent").images, one)
    assert generate_classes(pipe, [1]).shape[0] == 1
    none = generate_classes(pipe, None, guidance_scale=1.0, batch_size=2)
    assert torch.equal(generate_classes(pipe, [3, 3], guidance_scale=1.0), none)


def test_a_network_without_classes():
    pipe = build(classes=0)
    assert generate_classes(pipe, None, guidance_scale=1.0, batch_size=3).shape == (3, 3, 8, 8)
    stock = tiny_unconditional()
    ours = ClassConditionalPipeline(stock.unet, zsnr_diffusers.ZeroSNRDDIMScheduler(**V))
    stock.set_progress_bar_config(disable=True)
    ours.set_progress_bar_config(disable=True)
    images = ours(num_inference_steps=5, generator=seeded(), output_type="np").images
    # stock's DDIM, at a step count that divides T
    np.testing.assert_allclose(
        images, stock(num_inference_steps=5, generator=seeded(), output_type="np").images, atol=1e-5
    )


def test_one_generator_per_picture_and_given_noise():
    pipe = build()
    together = generate_classes(pipe, generator=[seeded(1), seeded(2)])
    alone = [generate_classes(pipe, [label], generator=seeded(seed)) for label, seed in [(0, 1), (2, 2)]]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=seeded(seed)) for seed in (1, 2)])
    torch.testing.assert_close(generate_classes(pipe, latents=noise), together, rtol=1e-5, atol=1e-5)


def test_callbacks_and_interruption():
    pipe, seen = build(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not generate_classes(pipe, callback_on_step_end=callback).any()
    assert seen == [(0, 999), (1, 749)]
    assert torch.equal(generate_classes(pipe), generate_classes(build()))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 7, 61])
def test_half_precision_and_odd_numbers_of_steps(dtype, steps):
    images = generate_classes(build().to(dtype), num_inference_steps=steps, guidance_rescale=0.7)
    assert images.dtype == dtype
    assert bool(images.isfinite().all())


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([0, 4], {}, r"class_labels has 4; this network has 0 to 2, and 3 for no class"),
        ([-1], {}, r"class_labels has -1"),
        ([], {}, r"batch_size=None for 0 class_labels"),
        ([0, 1], {"batch_size": 3}, r"batch_size=3 for 2 class_labels"),
        (None, {}, r"guidance_scale=3.0 needs class_labels"),
        (
            [0],
            {"latents": torch.zeros(2, 3, 8, 8)},
            r"latents have shape \(2, 3, 8, 8\); these labels need \(1, 3, 8, 8\)",
        ),
        ([0], {"dynamic_thresholding_ratio": 1.5}, r"dynamic_thresholding_ratio=1.5 must lie in"),
        ([0], {"guidance_rescale": 2.0}, r"guidance_rescale=2.0 must lie in"),
    ],
)
def test_bad_calls_are_refused_before_the_network_runs(labels, kwargs, message):
    pipe = build()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=message):
        generate_classes(pipe, labels, **kwargs)
    assert not calls


def test_labels_for_a_network_without_classes_are_refused():
    for labels, scale in (([0], 1.0), (None, 3.0)):
        with pytest.raises(ValueError, match="no class embeddings"):
            generate_classes(build(classes=0), labels, guidance_scale=scale)


def test_a_scheduler_without_thresholding_is_named():
    pipe = build(EulerDiscreteScheduler.from_config(zero_snr_scheduler().config))
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no dynamic thresholding"):
        generate_classes(pipe, dynamic_thresholding_ratio=0.99)


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_saved_and_loaded(phi, tmp_path):
    pipe = build()
    if phi:
        enable_guidance_rescale(pipe, phi)
    expected = generate_classes(pipe)
    pipe.save_pretrained(tmp_path)
    for load in (load_pipeline, ClassConditionalPipeline.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is ClassConditionalPipeline
        assert type(loaded.scheduler) is zsnr_diffusers.ZeroSNRDDIMScheduler
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(generate_classes(loaded), expected)
    with pytest.raises(AttributeError, match="ClassConditionalPipeline"):  # stock does not know it
        DiffusionPipeline.from_pretrained(tmp_path)


def test_in_our_evaluation():
    images = generate_images(build(), [0, 1, 2], seeds=[0, 1, 2], num_inference_steps=2, guidance_rescale=0.7)
    assert [image.size for image in images] == [(8, 8)] * 3

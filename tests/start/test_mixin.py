import threading

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from guided_pipelines import generate
from peft import LoraConfig
from small_pipelines import PIPELINES
from starts import MODELS, features_of, first_input, fitted, quiet, strong_start
from tiny_adapters import needs_text_adapters
from tiny_pipelines import IMAGE, RIGHT_HALF, tiny_stable_diffusion

from zsnr_diffusers import (
    GuidanceRescaleMixin,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    disable_guidance_rescale,
    disable_start,
    enable_guidance_rescale,
    enable_start,
)
from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw
from zsnr_diffusers.core.noise import noise_level, noise_level_of_ratio
from zsnr_diffusers.start import Start, StartMixin, hand_set_start

TRAINED = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
]


def scheduled(pipe, cls, **changes):
    changes |= {"rescale_betas_zero_snr": False} if cls.__name__.startswith("ZeroSNR") else {}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
    return pipe


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("cls", TRAINED)
def test_the_network_sees_the_law_at_the_first_timestep_of_any_scheduler(cls, spacing):
    """alpha low + sigma noise, whatever form the scheduler's samples have; the level is read off its timestep."""
    spacing = {} if cls in (LCMScheduler,) else {"timestep_spacing": spacing}
    pipe = scheduled(quiet("1.5"), cls, **spacing)
    call = {"num_inference_steps": 10, "generator": torch.Generator().manual_seed(0)}
    noise, _ = first_input(pipe, **call)
    start = strong_start(pipe)
    enable_start(pipe, start)
    x, timestep = first_input(pipe, **{**call, "generator": torch.Generator().manual_seed(0)})
    table = pipe.scheduler.alphas_cumprod.double()
    if hasattr(pipe.scheduler, "sigmas") and cls in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
        # Their last sigma is that of the timestep between whole ones.
        level = noise_level_of_ratio(float(pipe.scheduler.sigmas[0]))
    else:
        level = noise_level(table, int(timestep))
    assert 0 < float(level.alpha) < 0.2
    mean = start.law.mean(features_of(pipe, ["a dark landscape"]))
    unit = noise / noise.std() * 1  # the scheduler's own factor is 1 up to sqrt(1 + 1 / sigma^2)
    torch.manual_seed(0)
    own = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    assert torch.corrcoef(torch.stack([own.flatten(), unit.flatten()]))[0, 1] > 0.999
    expected = start.law.noisy(own, mean, level)
    torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)  # sigmas of stock are float32
    assert (x - noise).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_prompts_decide_each_for_its_own_images(name):
    pipe = quiet(name)
    start = strong_start(pipe)
    enable_start(pipe, start)
    prompts = ["a dark landscape", "snow in the sun"]
    x, timestep = first_input(
        pipe,
        prompt=prompts,
        num_images_per_prompt=2,
        num_inference_steps=4,
        guidance_scale=5.0,
        negative_prompt=["x", "y"],
    )
    assert len(x) == 8  # two predictions
    means = start.law.mean(features_of(pipe, prompts))
    level = noise_level(pipe.scheduler.alphas_cumprod.double(), int(timestep))
    found = x[:4].mean(dim=(2, 3)) / float(level.alpha)
    spread = (start.law.covariance.diagonal()[0] * 4 + 1 / (64 * float(level.alpha) ** 2)) ** 0.5
    assert (found - means[[0, 0, 1, 1], :, 0, 0]).abs().max() < 5 * spread
    assert (means[0] - means[1]).abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_in_place_of_a_prompt_are_the_same(name):
    pipe = enable_start(quiet(name), strong_start(quiet(name)))
    encoded = pipe.encode_prompt(
        prompt="a dark landscape", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    sizes = {"height": 64, "width": 64, "guidance_scale": 3.0, "num_inference_steps": 2}
    call = dict(zip(names, encoded, strict=False)) | sizes
    given, _ = first_input(pipe, call, generator=torch.Generator().manual_seed(0))
    told, _ = first_input(pipe, guidance_scale=3.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(given, told)


def test_latents_of_the_caller_are_left_alone():
    pipe = quiet("1.5")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before, _ = first_input(pipe, latents=latents)
    enable_start(pipe, strong_start(pipe))
    assert torch.equal(first_input(pipe, latents=latents)[0], before)


def test_at_zero_terminal_snr_nothing_changes(log):
    pipe = tiny_stable_diffusion()
    before = generate(pipe)
    enable_start(pipe, strong_start(pipe))
    assert "ends in pure noise" in log.text
    pipe.scheduler.alphas_cumprod[-1] = 0  # 2^-24 in its place is stock's
    assert torch.equal(generate(pipe), before)


def test_image_to_image_knows_its_image_already():
    pipe = quiet("1.5")
    with pytest.raises(TypeError, match="StableDiffusionImg2ImgPipeline does not draw its initial noise"):
        enable_start(StableDiffusionImg2ImgPipeline.from_pipe(pipe), strong_start(pipe))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_begins_with_noise_at_full_strength_alone(strength):
    pipe = StableDiffusionInpaintPipeline.from_pipe(quiet("1.5"))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a", "image": IMAGE, "mask_image": RIGHT_HALF, "height": 64, "width": 64, "strength": strength}
    seed = lambda: {"generator": torch.Generator().manual_seed(0)}  # noqa: E731
    before, _ = first_input(pipe, call, **seed())
    enable_start(pipe, strong_start(pipe))
    after, _ = first_input(pipe, call, **seed())
    assert torch.equal(before, after) == (strength < 1)


def test_a_start_set_by_hand_holds_for_every_prompt():
    pipe = quiet("1.5")
    start = hand_set_start(pipe, brightness=-0.8)
    enable_start(pipe, start)
    x, timestep = first_input(
        pipe, prompt=["a", "b"], num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = noise_level(pipe.scheduler.alphas_cumprod.double(), int(timestep))
    detail = noise - noise.mean(dim=(2, 3), keepdim=True)  # of the mean, all noise is gone
    expected = float(level.alpha) * start.law.bias.reshape(1, 4, 1, 1) + float(level.sigma) * detail
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_it_comes_off_again():
    pipe = quiet("1.5")
    before = generate(pipe)
    enable_start(pipe, strong_start(pipe))
    assert not torch.equal(generate(pipe), before)
    assert torch.equal(generate(disable_start(pipe)), before)
    assert type(pipe) is StableDiffusionPipeline
    assert "default_start" not in vars(pipe)
    assert torch.equal(generate(disable_start(pipe)), before)


@pytest.mark.parametrize("first", ["start", "guidance"])
def test_guidance_rescale_beside_it_in_any_order(first):
    pipe = quiet("1.5")
    start = strong_start(pipe)
    steps = [lambda: enable_start(pipe, start), lambda: enable_guidance_rescale(pipe, 0.7, strict=True)]
    for step in steps if first == "start" else steps[::-1]:
        step()
    both = generate(pipe)
    assert isinstance(pipe, StartMixin)
    assert isinstance(pipe, GuidanceRescaleMixin)
    alone = generate(disable_guidance_rescale(pipe))
    assert not torch.equal(both, alone)
    assert isinstance(pipe, StartMixin)
    enable_guidance_rescale(pipe, 0.7, strict=True)
    assert torch.equal(generate(pipe), both)
    disable_start(pipe)
    assert torch.equal(generate(pipe), generate(enable_guidance_rescale(quiet("1.5"), 0.7)))
    assert type(disable_guidance_rescale(pipe)) is StableDiffusionPipeline


def test_a_class_of_one_s_own():
    class Mine(StartMixin, GuidanceRescaleMixin, StableDiffusionPipeline):
        pass

    pipe = quiet("1.5")
    mine = Mine(**pipe.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    assert torch.equal(generate(mine), generate(pipe))
    start = strong_start(pipe)
    enable_start(mine, start)
    assert type(mine) is Mine
    assert torch.equal(generate(mine), generate(enable_start(pipe, start)))
    assert torch.equal(generate(disable_start(mine)), generate(disable_start(pipe)))


def test_a_class_with_a_start_of_its_own_can_be_without_it():
    class Dark(StartMixin, StableDiffusionPipeline):
        default_start = hand_set_start(quiet("1.5"), brightness=-0.9)

    pipe = quiet("1.5")
    dark = Dark(**pipe.components, requires_safety_checker=False)
    dark.set_progress_bar_config(disable=True)
    assert not torch.equal(generate(dark), generate(pipe))
    assert torch.equal(generate(disable_start(dark)), generate(pipe))


def test_threads_that_share_a_pipeline_have_their_own_prompts():
    pipe = enable_start(quiet("1.5"), strong_start(quiet("1.5")))
    features = {}
    barrier = threading.Barrier(2)

    def run(prompt):
        pipe.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        barrier.wait()
        latents = pipe.prepare_latents(1, 4, 64, 64, torch.float32, "cpu", torch.Generator().manual_seed(0))
        features[prompt] = latents

    pipe.scheduler.set_timesteps(4)
    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in ("a dark landscape", "snow")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for prompt, latents in features.items():
        pipe.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        alone = pipe.prepare_latents(1, 4, 64, 64, torch.float32, "cpu", torch.Generator().manual_seed(0))
        torch.testing.assert_close(latents, alone, rtol=0, atol=1e-4)  # kernels round by the number of threads


def test_what_does_not_go_together_is_refused():
    pipe, other = quiet("1.5"), quiet("2.1-base")
    with pytest.raises(ValueError, match=r"fitted for strong, and the \w+ of this pipeline has different weights"):
        enable_start(pipe, strong_start(other))
    assert type(pipe) is StableDiffusionPipeline
    with pytest.raises(ValueError, match="EDMEulerScheduler has no variance-preserving schedule"):
        enable_start(scheduled(quiet("1.5"), EDMEulerScheduler), strong_start(pipe))
    with pytest.raises(FileNotFoundError):
        enable_start(pipe, "nowhere.safetensors")
    start = strong_start(pipe, num_features=7)
    enable_start(pipe, start)
    with pytest.raises(ValueError, match=r"needs 7 features per prompt for a batch of 1, .* give \[1, \d+\]"):
        first_input(pipe)
    with pytest.raises(ValueError, match=r"latents of 4 channels, \[B, 4, h, w\], but these are \[1, 3, 8, 8\]"):
        pipe.prepare_latents(1, 3, 64, 64, torch.float32, "cpu", None)


def test_a_fine_tune_is_warned_of_and_rounding_is_not(log):
    pipe = quiet("1.5")
    start = strong_start(pipe)
    enable_start(quiet("1.5").to(torch.bfloat16), start)
    enable_start(quiet("1.5").to(torch.float16), start)
    assert "was fine-tuned" not in log.text
    for weights in pipe.text_encoder.parameters():
        change = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
        weights.data += 0.05 * weights.data.abs().mean() * change
    enable_start(pipe, start)
    assert "the text_encoder of this pipeline was fine-tuned" in log.text


def first_noise(dtype):
    return torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=dtype).float()


@pytest.mark.skipif(
    not torch.allclose(first_noise(torch.bfloat16), first_noise(torch.float32), atol=0.02),
    reason="this torch draws other numbers in half precision",
)
def test_half_precision_starts_from_the_same():
    pipe = quiet("1.5")
    start = fitted("1.5")
    enable_start(pipe, start)
    x, _ = first_input(pipe, generator=torch.Generator().manual_seed(0))
    half = enable_start(quiet("1.5").to(torch.bfloat16), start)
    rounded, _ = first_input(half, generator=torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), x, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("part", ["unet", pytest.param("text_encoder", marks=needs_text_adapters)])
def test_with_an_adapter_the_start_is_put_in(part):
    """It is not taken for that of another base; one in the text encoder means something else by the prompt."""
    pipe = quiet("1.5")
    start = strong_start(pipe)
    plain, _ = first_input(enable_start(quiet("1.5"), start), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)
    getattr(pipe, part).add_adapter(config)
    x, _ = first_input(enable_start(pipe, start), generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, plain) == (part == "unet")


def test_a_control_image_and_the_start_together():
    small = PIPELINES["StableDiffusionControlNetPipeline"]
    pipe = small.build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)

    def images():
        torch.manual_seed(0)
        return np.asarray(pipe(**small.arguments()).images)

    stock = images()
    enable_start(pipe, Start(LowFrequencyLaw.of_amplitudes(torch.full((4, 1, 1), 5.0))))
    assert not np.array_equal(images(), stock)
    disable_start(pipe)
    assert np.array_equal(images(), stock)

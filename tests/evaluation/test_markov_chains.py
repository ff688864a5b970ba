import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from tiny_pipelines import seeded, tiny_unet, zero_snr_scheduler

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler
from zsnr_diffusers.evaluation import Chain, chain_picture, denoising_chain, noising_chain, sample_grid

V = {"prediction_type": "v_prediction"}
PIXELS = 40_000
LEVEL = 0.5


def alpha_bars(scheduler):
    """alpha_bar by the paper's t, 1 at t = 0."""
    return [1.0, *scheduler.alphas_cumprod.double().tolist()]


@pytest.mark.parametrize("make", [lambda: ZeroSNRDDPMScheduler(**V), DDPMScheduler, zero_snr_scheduler])
def test_noise_has_the_marginals_and_the_memory_of_one_markov_chain(make):
    """From one value everywhere, x_t is Gaussian; its moments, and those of each pair of frames, are known.

    cov(x_s, x_t) = alpha_t / alpha_s sigma_s^2: each step shrinks what it got and adds noise of its own. Draws of
    their own for each t would have no covariance, and the same noise for all would have sigma_s sigma_t.
    """
    scheduler = make()
    images = torch.full((2, 1, 100, PIXELS // 200), LEVEL, dtype=torch.float64)
    chain = noising_chain(scheduler, images, num_frames=6, seed=1)
    assert chain.times == (0, 200, 400, 600, 800, 1000)
    assert chain.estimates is None
    assert torch.equal(chain.samples[0], images)
    table = alpha_bars(scheduler)
    x, alpha, sigma = {}, {}, {}
    for t, frame in zip(chain.times, chain.samples, strict=True):
        x[t], alpha[t], sigma[t] = frame.flatten(), math.sqrt(table[t]), math.sqrt(1 - table[t])
        # four standard errors, on fixed noise
        assert abs(x[t].mean() - alpha[t] * LEVEL) <= 4 * sigma[t] / math.sqrt(PIXELS)
        assert abs(x[t].var() - sigma[t] ** 2) <= 4 * sigma[t] ** 2 * math.sqrt(2 / PIXELS)
    for s in chain.times[1:]:
        for t in (t for t in chain.times if t > s):
            expected = alpha[t] / alpha[s] * sigma[s] ** 2
            error = math.sqrt(((sigma[s] * sigma[t]) ** 2 + expected**2) / PIXELS)
            assert abs(torch.cov(torch.stack([x[s], x[t]]))[0, 1] - expected) <= 4 * error


@pytest.mark.parametrize(
    "scheduler", [ZeroSNRDDIMScheduler(**V), zero_snr_scheduler(), EulerDiscreteScheduler(rescale_betas_zero_snr=True)]
)
def test_at_zero_snr_nothing_of_the_picture_is_left(scheduler):
    """Not even what stock's Euler leaves: it puts 2^-24 where the schedule has zero."""
    images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)

    def differ(scheduler):
        one, other = (noising_chain(scheduler, sign * images, num_frames=3).samples for sign in (1, -1))
        return [not torch.equal(*frames) for frames in zip(one, other, strict=True)]

    assert differ(scheduler) == [True, True, False]
    assert differ(DDPMScheduler()) == [True, True, True]


def test_the_seed_decides_and_every_step_can_be_a_frame():
    scheduler = ZeroSNRDDIMScheduler(num_train_timesteps=20, **V)
    images = torch.zeros(2, 1, 4, 4)
    chain = noising_chain(scheduler, images, num_frames=21)
    assert chain.times == tuple(range(21))
    assert torch.equal(chain.samples, noising_chain(scheduler, images, num_frames=21).samples)
    assert not torch.equal(chain.samples, noising_chain(scheduler, images, num_frames=21, seed=1).samples)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_in_half_precision_is_that_of_single_precision_rounded(dtype):
    images = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).to(dtype)
    half, single = (noising_chain(ZeroSNRDDIMScheduler(**V), x) for x in (images, images.float()))
    assert half.samples.dtype == dtype
    assert torch.equal(half.samples, single.samples.to(dtype))


@pytest.mark.parametrize(
    ("images", "num_frames", "message"),
    [
        (torch.zeros(3, 8, 8), 9, r"\[n, C, H, W\]; got torch.float32, \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 9, "x / 127.5 - 1"),
        (torch.full((1, 3, 8, 8), 255.0), 9, r"\[-1, 1\], got 255 to 255"),
        (torch.full((1, 3, 8, 8), math.nan), 9, "got nan"),
        (torch.zeros(1, 3, 8, 8), 1, r"num_frames=1 must lie in \[2, 1001\]"),
        (torch.zeros(1, 3, 8, 8), 1002, "there are 1000 timesteps"),
    ],
)
def test_images_and_frames_that_are_refused(images, num_frames, message):
    with pytest.raises(ValueError, match=message):
        noising_chain(ZeroSNRDDIMScheduler(**V), images, num_frames)


def test_a_scheduler_of_another_kind_is_named():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no diffusion schedule"):
        noising_chain(FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 3, 8, 8))


# Noise taken away


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipelines():
    yield quiet(ClassConditionalPipeline(tiny_unet(), ZeroSNRDDPMScheduler(**V))), {"output_type": "latent"}
    yield (
        quiet(ClassConditionalPipeline(tiny_unet(), EulerDiscreteScheduler.from_config(zero_snr_scheduler().config))),
        {"output_type": "latent"},
    )
    yield quiet(DDPMPipeline(tiny_unet(), DDPMScheduler())), {"output_type": "np"}
    yield quiet(DDIMPipeline(tiny_unet(), zero_snr_scheduler())), {"output_type": "np", "eta": 0.5}


@pytest.mark.full
@pytest.mark.parametrize("which", range(4), ids=["ours", "ours with Euler", "DDPM", "DDIM"])
def test_the_chain_is_the_pipeline_s_own_run(which):
    """Against its loop, written out: noise, then the network and the scheduler in turn."""
    pipe, call = list(pipelines())[which]
    call |= {"batch_size": 2, "num_inference_steps": 6}
    chain = denoising_chain(pipe, num_frames=4, **call, generator=seeded())
    assert "step" not in vars(pipe.scheduler)

    made = pipe(**call, generator=seeded()).images
    last = chain.samples[-1]
    if call["output_type"] == "np":
        last = (last / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(last, made)

    scheduler, generator = pipe.scheduler, seeded()
    scheduler.set_timesteps(6)
    extra = {"eta": call["eta"]} if "eta" in call else {}
    samples, estimates = [torch.randn(2, 3, 8, 8, generator=generator)], []
    assert torch.equal(chain.samples[0], samples[0])
    x = samples[0] * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            samples.append(scheduler.scale_model_input(x, t))
            stepped = scheduler.step(pipe.unet(samples[-1], t).sample, t, x, generator=generator, **extra)
            estimates.append(stepped.pred_original_sample)
            x = stepped.prev_sample
    expected = [*samples[1:], x]
    assert chain.times == (*(int(scheduler.timesteps[step]) + 1 for step in (0, 2, 4)), 0)
    for frame, step in enumerate((0, 2, 4, 6)):
        assert torch.equal(chain.samples[frame], expected[step])
        assert torch.equal(chain.estimates[frame], [*estimates, x][step])


def test_guidance_callbacks_and_half_precision():
    unet = tiny_unet(num_class_embeds=4).to(torch.bfloat16)
    pipe = quiet(ClassConditionalPipeline(unet, ZeroSNRDDIMScheduler(**V)))
    call = {"class_labels": [0, 2], "guidance_scale": 3.0, "guidance_rescale": 0.7, "num_inference_steps": 4}
    call |= {"output_type": "latent"}

    def grey(pipe, step, timestep, tensors):
        """In place, and after the step: what the next one starts from."""
        if step == 1:
            tensors["latents"].zero_()
        return tensors

    chain = denoising_chain(pipe, 5, **call, generator=seeded(), callback_on_step_end=grey)
    assert chain.samples.dtype == torch.bfloat16
    assert not chain.samples[2].any()
    assert chain.samples[1].all()
    made = pipe(**call, generator=seeded(), callback_on_step_end=grey).images
    assert torch.equal(chain.samples[-1], made)
    plain = denoising_chain(pipe, 5, **{**call, "guidance_rescale": 0.0}, generator=seeded())
    assert not torch.equal(plain.estimates[0], chain.estimates[0])


@pytest.mark.parametrize(
    ("scheduler", "num_frames", "callback", "message"),
    [
        (ZeroSNRDDIMScheduler(**V), 5, None, r"num_frames=5 must lie in \[2, 4\]: there are 3 steps"),
        (ZeroSNRDDIMScheduler(**V), 1, None, "num_frames=1"),
        (DPMSolverMultistepScheduler(), 3, None, "DPMSolverMultistepScheduler does not return its predicted x_0"),
        (ZeroSNRDDIMScheduler(**V), 3, lambda pipe, *_: setattr(pipe, "_interrupt", True), "did not run all steps"),
    ],
)
def test_runs_that_make_no_chain(scheduler, num_frames, callback, message):
    pipe = quiet(ClassConditionalPipeline(tiny_unet(), scheduler))
    with pytest.raises(ValueError, match=message):
        denoising_chain(pipe, num_frames, num_inference_steps=3, callback_on_step_end=callback)
    assert "step" not in vars(scheduler)


def test_a_step_that_was_replaced_before_stays_so():
    scheduler = DDIMScheduler.from_config(zero_snr_scheduler().config)
    step, calls = scheduler.step, []
    scheduler.step = replaced = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))[1]
    denoising_chain(quiet(ClassConditionalPipeline(tiny_unet(), scheduler)), 2, num_inference_steps=2)
    assert scheduler.step is replaced
    assert len(calls) == 2


# Images

COLOURS = {0: (255, 0, 0), 500: (0, 255, 0), 1000: (0, 0, 255)}


def solid_chain(times, estimates=False):
    """Two images of one colour per frame; estimates are of the negative colour."""
    colours = torch.tensor([COLOURS[t] for t in times]) / 127.5 - 1
    samples = colours[:, None, :, None, None].expand(-1, 2, -1, 8, 8)
    return Chain(times, samples, -samples if estimates else None)


@pytest.mark.parametrize("times", [(0, 500, 1000), (1000, 500, 0)], ids=["noising", "denoising"])
def test_columns_go_from_clean_to_noise_whichever_way_the_chain_ran(times, tmp_path):
    image = chain_picture(solid_chain(times, estimates=times[0] == 1000), tmp_path / "chain.png")
    expected = [[Image.new("RGB", (64, 64), COLOURS[t]) for t in sorted(times)]] * 2
    labels = ["x_t", ""]
    if times[0] == 1000:
        expected += [[Image.new("RGB", (64, 64), tuple(255 - c for c in COLOURS[t])) for t in sorted(times)]] * 2
        labels += ["x_0 as predicted from x_t", ""]
    headed = sample_grid(expected, labels, column_labels=["t = 0", "t = 500", "t = 1000"])
    assert np.array_equal(image, headed)
    assert np.array_equal(Image.open(tmp_path / "chain.png"), headed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_grey_pixels_are_enlarged_without_smoothing(dtype):
    board = torch.tensor([[-1.0, 1.0], [3.0, -3.0]], dtype=dtype).reshape(1, 1, 1, 2, 2)
    image = chain_picture(Chain((0,), board), cell=9).crop((104, 22, 112, 30))  # right of labels, below headings
    black, white = np.zeros((4, 4, 3)), np.full((4, 4, 3), 255)
    assert np.array_equal(image, np.block([[[black], [white]], [[white], [black]]]))


def test_large_images_keep_their_size():
    assert chain_picture(Chain((0,), torch.zeros(1, 1, 3, 100, 100))).height == 100 + 2 * 4 + 18


def test_latents_are_no_pictures():
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 4; decode latents"):
        chain_picture(Chain((0,), torch.zeros(1, 1, 4, 8, 8)))

"""Every sampler inside real stock pipelines: what they ask of a scheduler, and what a user may do to a run."""

import copy
import pickle
from types import SimpleNamespace

import oracles
import pytest
import torch
from cases import thirds
from diffusers import (
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import IMAGE, seeded, tiny_generation, tiny_stable_diffusion, tiny_unconditional, watch

from zsnr_diffusers import (
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRLCMScheduler,
)

SAMPLERS = {name: made for name, made in oracles.SAMPLERS.items() if name != "inverse"}
NOISY = oracles.NOISY
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
EVEN_AND_ODD = (1, 2, 3, 5, 7, 61)

ALPHA_BAR = DDIMScheduler.from_config(flawed_scheduler().config, rescale_betas_zero_snr=True).alphas_cumprod.double()
"""Stock's own zero-SNR table of the betas of every pipeline here, as a witness; its float32 is good to 1e-4."""
ALPHA, SIGMA = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
POINT, NEAR = 0.7, 1e-4


def scheduler_for(config, sampler, **changes):
    cls, options = SAMPLERS[sampler]
    return cls.from_config(config, **{"prediction_type": "v_prediction", **options, **changes})


def build(kind, sampler):
    """`tiny_painter` with the scheduler replaced as the README says."""
    pipe, generate = tiny_generation(kind)
    pipe.scheduler = scheduler_for(pipe.scheduler.config, sampler)
    return pipe, generate


def know_the_data(unet):
    """Let the network answer as for data that is the one point, whatever x_t is: v = (alpha x_t - x_0) / sigma."""

    def forward(x_t, timestep, *args, return_dict=True, **condition):
        v = ((ALPHA[timestep] * x_t - POINT) / SIGMA[timestep]).to(x_t.dtype)
        return SimpleNamespace(sample=v) if return_dict else (v,)

    unet.forward = forward


def trace(generate, n, **changes):
    """What is generated, and the latents after each step."""
    latents = []

    def record(pipe, i, t, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    return generate(n, callback_on_step_end=record, **changes), latents


# -- every pipeline


@pytest.mark.full
@thirds(("kind", "sampler"), ["text", "image", "inpaint", "xl", "xl-image", "unconditional"], SAMPLERS)
def test_n_steps_are_n_calls_of_the_network_from_the_last_timestep_on(kind, sampler):
    pipe, generate = build(kind, sampler)
    seen = watch(pipe.unet)
    know_the_data(pipe.unet)  # at once: it is its calls that are counted
    for n in EVEN_AND_ODD:
        seen.clear()
        images = generate(n)
        assert seen == pipe.scheduler.timesteps.tolist() == sorted(set(seen), reverse=True)
        assert (len(seen), seen[0]) == (n, 999)
        assert getattr(pipe, "num_timesteps", n) == n
        assert bool(images.isfinite().all())


@thirds(("sampler", "n"), SAMPLERS, EVEN_AND_ODD)
def test_the_data_is_reached_and_each_sample_on_the_way_has_its_noise(sampler, n):
    """Of data that is one point, x_t is alpha x_0 + sigma noise: the noise of the start, unless it is made afresh."""
    pipe, generate = build("text", sampler)
    know_the_data(pipe.unet)
    noise = torch.randn(16, 4, 4, 4, generator=seeded())
    result, on_the_way = trace(generate, n, latents=noise, num_images_per_prompt=16)
    torch.testing.assert_close(result, torch.full_like(result, POINT), rtol=0, atol=NEAR)
    for latents, t in zip(on_the_way, pipe.scheduler.timesteps[1:], strict=False):
        left = (latents - ALPHA[t] * POINT) / SIGMA[t]
        if sampler in NOISY:  # 1024 values: chance is 0.03 for the mean and 0.02 for the spread
            assert abs(left.mean()) < 0.13
            assert abs(left.std() - 1) < 0.09
        else:
            torch.testing.assert_close(left, noise, rtol=0, atol=2e-3)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reaches_the_data_too(sampler, dtype):
    """Each output and sample is rounded, and the last step weighs outputs by more than 1: a few eps are left."""
    scheduler, unet = scheduler_for(flawed_scheduler().config, sampler), torch.nn.Identity()
    know_the_data(unet)
    for n in EVEN_AND_ODD:
        scheduler.set_timesteps(n)
        x = torch.randn(1, 4, 8, 8, generator=seeded()).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=seeded(1)).prev_sample
            assert x.dtype == dtype
            assert bool(x.isfinite().all())
        assert (x.double() - POINT).abs().max() < 8 * torch.finfo(dtype).eps


# -- from an image


@pytest.mark.full
@thirds(("sampler", "strength_and_n"), SAMPLERS, [(0.01, 100), (0.1, 20), (0.5, 20), (0.9, 10), (1.0, 10)])
def test_image_to_image(sampler, strength_and_n):
    strength, n = strength_and_n
    pipe, generate = build("image", sampler)
    seen = watch(pipe.unet)
    result, other = (generate(n, image=image, strength=strength) for image in (IMAGE, 1 - IMAGE))
    steps = round(n * strength)
    assert len(seen) == 2 * steps == 2 * pipe.num_timesteps
    assert seen[:steps] == pipe.scheduler.timesteps[-steps:].tolist()
    assert bool(result.isfinite().all())
    assert torch.equal(result, other) == (strength == 1.0)  # from pure noise nothing is left of the image
    with torch.no_grad():
        start = pipe.vae.encode(2 * IMAGE - 1).latent_dist.sample(seeded()) * pipe.vae.config.scaling_factor
    distance = (result - start).std().item()
    if strength == 0.01:
        assert distance < 0.15  # the noise of the last timesteps
    elif strength > 0.8:
        assert distance > 0.5
    know_the_data(pipe.unet)
    torch.testing.assert_close(generate(n, strength=strength), torch.full_like(result, POINT), rtol=0, atol=NEAR)


@pytest.mark.full
@every_sampler
@pytest.mark.parametrize("known", [False, True])
def test_inpainting_keeps_what_is_not_masked(sampler, known):
    pipe, generate = build("inpaint", sampler)
    if known:
        know_the_data(pipe.unet)
    encode, originals = pipe._encode_vae_image, []
    pipe._encode_vae_image = lambda *args, **kwargs: originals.append(encode(*args, **kwargs)) or originals[-1]
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    result, on_the_way = trace(generate, 7, latents=noise)
    original = originals[0]
    assert torch.equal(result[..., :4], original[..., :4])
    assert not bool(torch.isclose(result[..., 4:], original[..., 4:]).any())
    for latents, t in zip(on_the_way, pipe.scheduler.timesteps[1:], strict=False):
        noised = (ALPHA[t] * original + SIGMA[t] * noise).float()
        torch.testing.assert_close(latents[..., :4], noised[..., :4], rtol=1e-4, atol=1e-4)
    if known:
        assert (result[..., 4:] - POINT).abs().max() < NEAR


@pytest.mark.full
@every_sampler
def test_a_refiner_takes_over_where_the_base_stopped(sampler):
    """`denoising_end` and `denoising_start` of Stable Diffusion XL. DDIM, which remembers nothing, notices nothing."""
    (base, start), (refiner, finish) = build("xl", sampler), build("xl-image", sampler)
    seen = watch(base.unet), watch(refiner.unet)
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    halfway = start(10, latents=noise, denoising_end=0.4)
    split = finish(10, image=halfway, denoising_start=0.4, output_type="latent")
    timesteps = base.scheduler.timesteps.tolist()
    assert seen == ([t for t in timesteps if t >= 600], [t for t in timesteps if t < 600])
    assert all(seen)
    if sampler == "ddim":
        torch.testing.assert_close(split, start(10, latents=noise), rtol=1e-5, atol=1e-5)
    assert bool(split.isfinite().all())
    know_the_data(refiner.unet)
    known = finish(10, image=halfway, denoising_start=0.4)
    torch.testing.assert_close(known, torch.full_like(known, POINT), rtol=0, atol=NEAR)


# -- stock's DDIMPipeline, which takes no scheduler but its own


@every_sampler
def test_diffusers_ddim_pipeline_makes_ddim_of_a_scheduler_and_keeps_zero_snr(sampler):
    """Sampling by ours goes through DDPMPipeline. Of `kappa`, which diffusers does not know, `trailing` is left."""
    pipe = DDIMPipeline(tiny_unconditional().unet, scheduler_for(flawed_scheduler().config, sampler))
    pipe.set_progress_bar_config(disable=True)
    theirs = torch.as_tensor(pipe(num_inference_steps=5, generator=seeded(), output_type="np").images)
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    assert pipe.scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(theirs, build("unconditional", "ddim")[1](5), rtol=1e-4, atol=1e-4)


# -- no step is left


def outcome(generate, n, **changes):
    """The shape of what is made, or why nothing is."""
    try:
        return generate(n, **changes).shape
    except ValueError as error:
        return str(error)


@pytest.mark.full
@thirds(
    ("n", "kind_and_changes"),
    [1, 2, 4, 50],
    [
        *((kind, {"strength": x}) for kind in ("image", "inpaint", "xl-image") for x in (0.0, 1e-9, 0.01)),
        *(("xl-image", {"denoising_start": x}) for x in (0.5, 0.999, 0.9999999)),
        *(("xl", {"denoising_end": x}) for x in (1e-6, 0.01)),
    ],
)
def test_a_share_of_the_steps_that_is_none_is_what_it_is_with_diffusers_schedulers(n, kind_and_changes):
    """Each pipeline has its own answer: an empty batch, the image as it came, or a refusal."""
    kind, changes = kind_and_changes
    pipe, generate = tiny_generation(kind)
    config = pipe.scheduler.config
    theirs = []
    for cls in (DDIMScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = cls.from_config(config, timestep_spacing="trailing")
        theirs.append(outcome(generate, n, **changes))
    assert theirs == theirs[:1] * 3
    for sampler in SAMPLERS:
        pipe.scheduler = scheduler_for(config, sampler)
        assert outcome(generate, n, **changes) == theirs[0], sampler


@pytest.mark.full
@every_sampler
def test_a_run_without_steps_leaves_nothing_behind(sampler):
    generate = build("image", sampler)[1]
    before = generate(4, strength=0.5)
    generate(4, strength=0.0)
    assert torch.equal(generate(4, strength=0.5), before)


# -- noise levels in place of timesteps


@pytest.mark.full
@thirds(("kind", "sampler"), ["text", "image", "inpaint", "xl", "xl-image"], SAMPLERS)
def test_sigmas_are_what_the_network_is_called_at(kind, sampler):
    pipe, generate = build(kind, sampler)
    seen = watch(pipe.unet)
    wanted = [999, 700, 400, 100]
    sigmas = [float("inf"), *(SIGMA[wanted[1:]] / ALPHA[wanted[1:]]).tolist(), 0.0]
    results = [generate(4, sigmas=sigmas), generate(4, timesteps=wanted)]
    assert seen == 2 * wanted
    assert torch.equal(*results)


# -- inversion


@pytest.mark.full
def test_an_inverted_image_comes_back_out_of_the_pipeline():
    pipe, generate = build("text", "ddim")
    seen = watch(pipe.unet)
    image, errors = torch.randn(1, 4, 4, 4, generator=seeded()), []
    embeds = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for n in (7, 14, 28, 56):
        for cls in (DDIMInverseScheduler, ZeroSNRDDIMInverseScheduler):
            inverse, x = cls.from_config(flawed_scheduler().config, **flags), image
            inverse.set_timesteps(n)
            seen.clear()
            with torch.no_grad():
                for t in inverse.timesteps:
                    x = inverse.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample
            back = generate(n, prompt=None, prompt_embeds=embeds, latents=x, guidance_scale=1.0)
            errors.append((back - image).abs().max().item())
        assert seen[:n] == inverse.timesteps.tolist() == seen[n:][::-1]
        assert seen[n - 1] == 999
    stock, ours = errors[::2], errors[1::2]
    assert all(mine < theirs / 4 for mine, theirs in zip(ours, stock, strict=True)), errors
    assert ours == sorted(ours, reverse=True)
    assert ours[-1] < 0.03


# -- what a user does to a run


@pytest.mark.full
@thirds(("sampler", "where"), SAMPLERS, [0, 3, 6])
def test_latents_changed_in_a_callback_are_what_sampling_goes_on_from(sampler, where):
    pipe, generate = build("text", sampler)
    noise, new = torch.randn(2, 1, 4, 4, 4, generator=seeded())

    def change(pipe, i, t, tensors):
        return {"latents": new if i == where else tensors["latents"]}

    once = {"latents": noise, "guidance_scale": 1.0}
    changed = generate(8, callback_on_step_end=change, **once, generator=seeded(1))
    x, scheduler = noise, scheduler_for(flawed_scheduler().config, sampler)
    embeds, generator = pipe.encode_prompt("a dark landscape", "cpu", 1, False)[0], seeded(1)
    scheduler.set_timesteps(8)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(pipe.unet(x, t, embeds).sample, t, x, generator=generator).prev_sample
            x = new if i == where else x
    assert torch.equal(changed, x)
    assert not torch.equal(changed, generate(8, **once, generator=seeded(1)))


@every_sampler
@pytest.mark.parametrize("where", [1, 4, 7])
def test_no_corrector_undoes_a_change_of_the_sample(sampler, where):
    """With the outputs held fixed, d added to x_t becomes K sigma_s / sigma_t d, by the equation atop `solvers.py`."""
    scheduler = scheduler_for(flawed_scheduler().config, sampler, prediction_type="sample")
    scheduler.set_timesteps(10)
    outputs, noises = torch.randn(2, 10, 50, dtype=torch.float64, generator=seeded())
    d = torch.linspace(-1, 1, 50, dtype=torch.float64)
    runs = []
    for change in (0 * d, d):
        x = torch.ones(50, dtype=torch.float64)
        runs.append([])
        for i, t in enumerate(scheduler.timesteps):
            x = x + change if i == where else x
            x = scheduler.step(outputs[i], t, x, variance_noise=noises[i]).prev_sample
            runs[-1].append(x)
    first, kappa = scheduler.timesteps[where], ALPHA / SIGMA
    for i, s in enumerate(scheduler.timesteps[where + 1 :], start=where):
        kept = {"lcm": 0.0}.get(sampler, SIGMA[s] / SIGMA[first] * (kappa[first] / kappa[s]) ** (sampler in NOISY))
        torch.testing.assert_close(runs[1][i] - runs[0][i], kept * d, rtol=1e-3, atol=1e-12)


class StopError(Exception):
    pass


@pytest.mark.full
@thirds(("sampler", "how"), SAMPLERS, ["to the end", "by an error", "by interrupting"])
def test_a_run_leaves_nothing_behind_however_it_ended(sampler, how):
    """Nor for an image-to-image pipeline of the same parts that starts at the step after the last one taken."""
    pipe, generate = build("text", sampler)
    before, taken = generate(8), []

    def stop(pipe, i, t, tensors):
        taken.append(i)
        if how == "by an error" and i == 3:
            raise StopError
        pipe._interrupt = how == "by interrupting" and i == 3
        return tensors

    def disturb():
        try:
            generate(8, prompt=["a cat", "snow"], generator=seeded(5), callback_on_step_end=stop)
        except StopError:
            assert how == "by an error"
        assert taken[-1] == (7 if how == "to the end" else 3)

    disturb()
    assert torch.equal(generate(8), before)
    image_pipe, paint_over = build("image", sampler)
    fresh = paint_over(8, strength=0.5)
    image_pipe.scheduler = pipe.scheduler
    disturb()
    assert torch.equal(paint_over(8, strength=0.5), fresh)


@pytest.mark.full
@every_sampler
def test_generators_decide_the_noise_and_only_where_there_is_some(sampler):
    _, generate = build("text", sampler)
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    one, same, other = (generate(5, latents=noise, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (sampler not in NOISY)
    pair = generate(5, num_images_per_prompt=2, generator=[seeded(1), seeded(2)])
    torch.testing.assert_close(pair[:1], generate(5, generator=seeded(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.full
@every_sampler
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_a_copy_made_in_the_middle_goes_on_alike(sampler, copied):
    pipe, generate = build("text", sampler)
    whole, original = generate(8), pipe.scheduler

    def replace(pipe, i, t, tensors):
        if i == 3:
            pipe.scheduler = copied(pipe.scheduler)
        return tensors

    assert torch.equal(generate(8, callback_on_step_end=replace), whole)
    assert pipe.scheduler is not original


def test_latent_consistency_pipelines_sample_with_ours():
    """They hand the timesteps of distillation to `set_timesteps`; image-to-image hands it the strength too."""
    pipe = tiny_stable_diffusion()
    parts = {**pipe.components, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
    parts["unet"] = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=32)
    parts["scheduler"] = ZeroSNRLCMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    text = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    latents = text("a", num_inference_steps=4, original_inference_steps=20, output_type="latent").images
    assert text.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    image = LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)
    image("a", image=latents, num_inference_steps=2, strength=0.5, output_type="latent")
    assert image.scheduler.timesteps.tolist() == [499, 259]
    with pytest.raises(ValueError, match=r"num_inference_steps=30 at strength=0.5: 25 of the 50"):
        image("a", image=latents, num_inference_steps=30, strength=0.5)

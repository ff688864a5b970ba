import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from scipy.stats import norm
from tiny_pipelines import tiny_unet

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler, ZeroSNRMultistepScheduler, build_unet
from zsnr_diffusers.evaluation import BitsPerDim, bits_per_dim

VARIANCE_TYPES = ["fixed_small", "fixed_large"]


class PixelStub(torch.nn.Module):
    """A pixel-space network in float64, given by a function of (x_t, timesteps [B]); remembers its calls."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, function, channels=3, size=4):
        super().__init__()
        self.function, self.calls = function, []
        self.config = SimpleNamespace(
            in_channels=channels, out_channels=channels, sample_size=size, num_class_embeds=None
        )

    def forward(self, x_t, timesteps, **condition):
        output = self.function(x_t, timesteps, **condition)
        self.calls.append((x_t, timesteps, output))
        return SimpleNamespace(sample=output)


def schedule(T=20, cls=ZeroSNRDDPMScheduler, **config):
    """Linear betas that end near pure noise whatever T is."""
    betas = {"beta_start": 1e-4, "beta_end": min(20 / T, 0.5), "num_train_timesteps": T}
    return cls(**{**betas, "prediction_type": "sample", **config})


def alpha_bars(scheduler):
    """From the config, in the words of the paper."""
    config = scheduler.config
    alpha_bar = np.cumprod(1 - np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps))
    if not config.rescale_betas_zero_snr:
        return alpha_bar
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def pictures(n=6, channels=3, size=4, seed=0):
    shape = (n, channels, size, size)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def columns(values, timesteps):
    """Values [T] at timesteps [B], to multiply [B, C, H, W]."""
    return torch.as_tensor(values)[timesteps].view(-1, 1, 1, 1)


def measure(unet, scheduler, images, *args, **kwargs):
    return bits_per_dim(unet, scheduler, images, *args, progress=False, **kwargs)


def odd_network(x_t, timesteps):
    return torch.sin(3 * x_t + 0.1 * timesteps.view(-1, 1, 1, 1)) - 0.2 * x_t


# -- the paper's bound


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize(
    ("prediction_type", "zero"), [("epsilon", False), ("sample", False), ("sample", True), ("v_prediction", True)]
)
@pytest.mark.parametrize("clip", [False, True])
def test_against_the_papers_formulas(variance_type, prediction_type, zero, clip):
    """Ho et al. 2020, eqs. 5, 7 and 13 as their code has them, from the betas and what the network saw and said."""
    config = {"prediction_type": prediction_type, "variance_type": variance_type, "clip_sample": clip}
    scheduler = schedule(rescale_betas_zero_snr=zero, **config)
    unet, images, T = PixelStub(odd_network), pictures(), 20
    found = measure(unet, scheduler, images, batch_size=7)

    alpha_bar = alpha_bars(scheduler)
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    log_q = np.log(np.append(variance[1], variance[1:]))
    log_p = np.log(np.append(variance[1], beta[1:])) if variance_type == "fixed_large" else log_q
    x_t, t, output = (torch.cat(parts).numpy() for parts in zip(*unet.calls, strict=True))
    assert t.tolist() == list(range(T)) * len(images)
    x_0 = np.repeat(images.numpy() / 127.5 - 1, T, axis=0)

    def at(values):
        return values[t].reshape(-1, 1, 1, 1)

    alpha, sigma = at(np.sqrt(alpha_bar)), at(np.sqrt(1 - alpha_bar))
    with np.errstate(divide="ignore"):
        predicted = {
            "sample": output,
            "v_prediction": alpha * x_t - sigma * output,
            "epsilon": (x_t - sigma * output) / alpha,
        }[prediction_type]
    predicted = predicted.clip(-1, 1) if clip else predicted
    of_x_0 = at(np.sqrt(before) * beta / (1 - alpha_bar))
    of_x_t = at(np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar))
    q, p = of_x_0 * x_0 + of_x_t * x_t, of_x_0 * predicted + of_x_t * x_t
    kl = 0.5 * (at(log_p - log_q) + np.exp(at(log_q - log_p)) + (q - p) ** 2 * np.exp(-at(log_p)) - 1)
    std = np.exp(0.5 * log_p[0])
    upper = np.where(x_0 > 0.999, np.inf, (x_0 + 1 / 255 - p) / std)
    lower = np.where(x_0 < -0.999, -np.inf, (x_0 - 1 / 255 - p) / std)
    mirrored = lower + upper > 0
    upper, lower = np.where(mirrored, -lower, upper), np.where(mirrored, -upper, lower)
    decoder = -norm.logcdf(upper) - np.log1p(-np.exp(norm.logcdf(lower) - norm.logcdf(upper)))
    terms = np.where(at(np.arange(T)) == 0, decoder, kl).mean(axis=(1, 2, 3)).reshape(-1, T) / math.log(2)
    prior = 0.5 * (alpha_bar[-1] * x_0[::T] ** 2 - alpha_bar[-1] - np.log1p(-alpha_bar[-1])) / math.log(2)

    # the betas above are differences that keep some 1e-12
    assert found.terms == pytest.approx(terms.mean(axis=0), rel=1e-8)
    assert found.prior == pytest.approx(prior.mean(), rel=1e-8)
    totals = terms.sum(axis=1) + prior.mean(axis=(1, 2, 3))
    assert found.total == pytest.approx(totals.mean(), rel=1e-8)
    assert found.standard_error == pytest.approx(totals.std(ddof=1) / math.sqrt(6), rel=1e-6)
    assert found.decoder == found.terms[0]
    assert found.steps == pytest.approx(terms[:, 1:].sum(axis=1).mean(), rel=1e-8)
    assert (found.n, found.variance_type) == (6, variance_type)


def test_the_network_sees_noised_pictures():
    """Mean and variance of x_t given x_0, at every timestep (Ho et al. 2020, eq. 4)."""
    scheduler, images = schedule(T=5), pictures(n=1, size=64)
    unet = PixelStub(lambda x_t, t: 0 * x_t, size=64)
    measure(unet, scheduler, images)
    ((x_t, timesteps, _),) = unet.calls
    alpha_bar = columns(alpha_bars(scheduler), timesteps)
    noise = (x_t - alpha_bar.sqrt() * (images / 127.5 - 1)) / (1 - alpha_bar).sqrt()
    bound = 5 / math.sqrt(noise[0].numel())  # five standard errors of a mean; of a variance it is 1.4 times that
    assert noise.mean(dim=(1, 2, 3)).abs().max() < bound
    assert (noise.var(dim=(1, 2, 3)) - 1).abs().max() < 1.5 * bound
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(5)
    assert correlations.abs().max() < bound  # fresh at each timestep


@pytest.mark.parametrize("zero", [False, True])
def test_data_of_one_point_costs_nothing_but_the_prior_and_the_decoder(zero):
    value, alone = 200, 200 / 127.5 - 1
    scheduler = schedule(rescale_betas_zero_snr=zero)
    result = measure(PixelStub(lambda x_t, t: torch.full_like(x_t, alone)), scheduler, pictures() * 0 + value)
    assert result.terms[1:].tolist() == [0.0] * 19
    assert result.standard_error < 1e-12
    assert (result.prior == 0) == zero
    alpha_bar = alpha_bars(scheduler)
    std = math.sqrt((1 - alpha_bar[1] / alpha_bar[0]) * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    within = 1 - 2 * norm.sf(1 / 255 / std)
    assert result.decoder == pytest.approx(-math.log2(within), rel=1e-6)


V = 0.06  # four standard deviations lie on the grid
ENTROPY = math.log2(2 * math.pi * math.e * V) / 2 + math.log2(127.5)


def gaussian_data(n):
    """Pixels N(0, V) on the grid of 256 values."""
    x_0 = np.random.default_rng(1).normal(scale=math.sqrt(V), size=(n, 1, 8, 8))
    return torch.from_numpy(np.rint((x_0 + 1) * 127.5).clip(0, 255).astype(np.uint8))


def gaussian_denoiser(alpha_bar):
    """v of their posterior mean."""

    def network(x_t, timesteps):
        signal = columns(alpha_bar, timesteps)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        x_0 = alpha * V / (signal * V + 1 - signal) * x_t
        return (alpha * x_t - x_0) / sigma

    return PixelStub(network, channels=1, size=8)


@pytest.mark.parametrize("zero", [False, True])
def test_gaussian_data_with_the_exact_denoiser(zero):
    """Each step is (SNR_s - SNR_t) / 2 Var[x_0 | x_t], and the whole is above the entropy by what it should be."""
    scheduler = schedule(1000, prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    alpha_bar, images = alpha_bars(scheduler), gaussian_data(n=20)
    result = measure(gaussian_denoiser(alpha_bar), scheduler, images)

    snr, spread = alpha_bar / (1 - alpha_bar), V * (1 - alpha_bar) / (alpha_bar * V + 1 - alpha_bar)
    steps = (snr[:-1] - snr[1:]) * spread[1:] / 2 / math.log(2)
    squares = math.sqrt(2 / images.numel())  # relative standard error of a mean of squares
    assert result.terms[1:] == pytest.approx(steps, rel=5 * squares)
    assert np.mean(result.terms[1:] / steps) == pytest.approx(1, abs=0.03)  # timesteps share the images

    # The cross entropy of N(0, spread) and the decoder's N(0, std^2) in narrow bins: right to hundredths of a bit
    std = math.sqrt((1 - alpha_bar[1] / alpha_bar[0]) * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    decoder = math.log2(2 * math.pi * std**2) / 2 + spread[0] / std**2 / 2 / math.log(2) + math.log2(127.5)
    excess = steps.sum() + decoder - ENTROPY
    assert 0.3 < excess < 0.8
    assert result.total - ENTROPY == pytest.approx(excess, abs=4 * result.standard_error + 0.03)
    assert result.total - ENTROPY > 4 * result.standard_error


def test_more_timesteps_tighten_it():
    """Kingma et al. 2021, section 4.1, on nested schedules, of which each is the one before refined."""
    images, fine = gaussian_data(n=10), alpha_bars(schedule(1000))
    totals = []
    for stride in (250, 25, 1):
        alpha_bar = np.unique(np.append(fine[0], fine[-1 : -len(fine) : -stride]))[::-1].copy()
        betas = (1 - alpha_bar / np.append(1.0, alpha_bar[:-1])).tolist()
        config = {"trained_betas": betas, "prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
        scheduler = ZeroSNRDDPMScheduler(num_train_timesteps=len(betas), **config)
        totals.append(measure(gaussian_denoiser(alpha_bar), scheduler, images).total)
    assert totals[0] > totals[1] + 1 > totals[2] + 2 > ENTROPY + 2  # bits: coarse steps cost much


def test_zero_terminal_snr_is_finite_at_every_timestep():
    for variance_type in VARIANCE_TYPES:
        scheduler = schedule(2, variance_type=variance_type)
        result = measure(PixelStub(odd_network), scheduler, pictures())
        assert result.prior == 0
        assert np.isfinite(result.terms).all()
        assert math.isfinite(result.total)
    ordinary = measure(PixelStub(odd_network), schedule(2, rescale_betas_zero_snr=False), pictures())
    assert ordinary.prior > 0


def test_an_epsilon_model_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match=r"epsilon.*cannot be used at zero signal-to-noise ratio"):
        schedule(prediction_type="epsilon")


def test_v_and_sample_prediction_of_one_function_are_equal():
    alpha_bar = alpha_bars(schedule())

    def as_sample(x_t, t):
        signal = columns(alpha_bar, t)
        return signal.sqrt() * x_t - (1 - signal).sqrt() * odd_network(x_t, t)

    v = measure(PixelStub(odd_network), schedule(prediction_type="v_prediction"), pictures())
    sample = measure(PixelStub(as_sample), schedule(), pictures())
    assert v.terms == pytest.approx(sample.terms, rel=1e-9)
    assert v.total == pytest.approx(sample.total, rel=1e-9)


# -- drawn timesteps


COLOUR = 51  # -0.6
FLAT = torch.full((1, 3, 4, 4), COLOUR, dtype=torch.uint8)


def flat_network(scheduler):
    """Of images of one colour, wrong by 0.4 sigma: a term is a function of its timestep, whatever the noise."""
    sigma = np.sqrt(1 - alpha_bars(scheduler))
    return PixelStub(lambda x_t, t: COLOUR / 127.5 - 1 + 0.4 * columns(sigma, t).expand_as(x_t))


@pytest.mark.full
@pytest.mark.parametrize("k", [2, 5, 13])
def test_the_estimate_has_the_expectation_of_the_sum(k):
    scheduler = schedule(T=30)
    whole = measure(flat_network(scheduler), scheduler, FLAT)
    many = measure(flat_network(scheduler), scheduler, FLAT.expand(4000, -1, -1, -1), timesteps_per_image=k)
    assert many.standard_error * math.sqrt(4000) > 0.001 * whole.steps  # drawing does add to it
    assert many.total == pytest.approx(whole.total, abs=4 * many.standard_error)
    # each timestep was drawn, and its term is its own
    assert many.terms == pytest.approx(whole.terms, rel=1e-9)


@pytest.mark.full
def test_the_estimate_over_seeds():
    scheduler = schedule(T=30, rescale_betas_zero_snr=False)
    whole = measure(flat_network(scheduler), scheduler, FLAT).total
    found = [
        measure(flat_network(scheduler), scheduler, FLAT, timesteps_per_image=6, seed=seed) for seed in range(400)
    ]
    totals = np.array([result.total for result in found])
    assert 0 < abs(totals.mean() - whole) < 4 * totals.std() / 20
    assert all(math.isnan(result.standard_error) for result in found)


def test_all_timesteps_are_all_groups():
    scheduler = schedule(T=30)
    whole = measure(PixelStub(odd_network), scheduler, pictures())
    same = measure(PixelStub(odd_network), scheduler, pictures(), timesteps_per_image=30)
    assert (same.total, same.standard_error) == (whole.total, whole.standard_error)


def test_each_picture_has_the_decoder_and_k_timesteps():
    unet = PixelStub(odd_network)
    result = measure(unet, schedule(T=200), pictures(n=3), timesteps_per_image=7)
    ((_, timesteps, _),) = unet.calls
    visited = timesteps.view(3, 7)
    assert visited[:, 0].tolist() == [0, 0, 0]
    assert bool((visited.diff(dim=1) > 0).all())
    assert not torch.equal(visited[0], visited[1])
    assert np.isfinite(result.terms).tolist() == [t in visited for t in range(200)]


def test_a_picture_has_its_timesteps_and_noise_whatever_the_batch():
    scheduler, images = schedule(T=30), pictures(n=5)
    options = {"timesteps_per_image": 6, "seed": 3}
    whole = measure(PixelStub(odd_network), scheduler, images, **options)
    for batch_size in (1, 4, 1000):
        split = measure(PixelStub(odd_network), scheduler, images, batch_size=batch_size, **options)
        assert split.total == pytest.approx(whole.total, rel=1e-12)
        assert split.terms == pytest.approx(whole.terms, rel=1e-12, nan_ok=True)
    other = measure(PixelStub(odd_network), scheduler, images, timesteps_per_image=6, seed=4)
    assert other.total != pytest.approx(whole.total, rel=1e-6)


# -- networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_network(dtype):
    scheduler = schedule(T=10, prediction_type="v_prediction")
    unet = tiny_unet().train()
    exact = measure(tiny_unet().double(), scheduler, pictures(size=8))
    result = measure(unet.to(dtype), scheduler, pictures(size=8))
    assert unet.training
    assert result.total == pytest.approx(exact.total, rel=10 * torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    unet, scheduler = tiny_unet(num_class_embeds=4), schedule(T=10, prediction_type="v_prediction")
    expected = measure(unet, scheduler, pictures(size=8), 1)
    found = measure(unet.cuda(), scheduler, pictures(size=8).cuda(), torch.ones(6, dtype=torch.long).cuda())
    assert found.total == pytest.approx(expected.total, rel=1e-2)  # tensor cores round the products to ten bits


def test_dropout_is_off():
    unet = build_unet("small-8", dropout=0.5).train()
    scheduler = schedule(T=4, prediction_type="v_prediction")
    assert measure(unet, scheduler, pictures(size=8)).total == measure(unet, scheduler, pictures(size=8)).total


def test_class_labels_reach_the_network():
    unet, images, scheduler = tiny_unet(num_class_embeds=4), pictures(size=8), schedule(T=10)

    def total(*labels):
        return measure(unet, scheduler, images, *labels).total

    assert total(None) == total(3) == total([3] * 6) != total(0)
    assert total(torch.tensor([0, 1, 2] * 2)) == total([0, 1, 2, 0, 1, 2])
    seen = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[1], kwargs)), with_kwargs=True)
    measure(unet, scheduler, images, [0, 1, 2, 0, 1, 2], batch_size=25)
    labels = torch.cat([kwargs["class_labels"] for _, kwargs in seen]).view(6, 10)
    assert labels.tolist() == [[label] * 10 for label in (0, 1, 2, 0, 1, 2)]
    assert torch.cat([timesteps for timesteps, _ in seen]).tolist() == [*range(10)] * 6


def test_other_samplers_have_the_posteriors_variance():
    expected = measure(PixelStub(odd_network), schedule(), pictures())
    for cls in (ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler):
        found = measure(PixelStub(odd_network), schedule(cls=cls), pictures())
        assert (found.total, found.variance_type) == (expected.total, "fixed_small")
    large = measure(PixelStub(odd_network), schedule(variance_type="fixed_large"), pictures())
    assert large.total != pytest.approx(expected.total, rel=0.01)


def test_measuring_leaves_a_run_alone():
    """A scheduler in the middle of sampling goes on where it was."""
    scheduler = schedule(cls=ZeroSNRMultistepScheduler)
    scheduler.set_timesteps(5)
    before = scheduler.timesteps.clone()
    x = torch.ones(1, 3, 4, 4)
    first = scheduler.step(x, before[0], x).prev_sample
    expected = scheduler.step(0.5 * x, before[1], first).prev_sample
    again = scheduler.step(x, before[0], x).prev_sample
    measure(PixelStub(odd_network), scheduler, pictures())
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(scheduler.step(0.5 * x, before[1], again).prev_sample, expected)


# -- images


def test_every_source_of_pictures_gives_the_same(tmp_path):
    images, scheduler = pictures(), schedule()
    expected = measure(PixelStub(odd_network), scheduler, images).total
    drawn = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    for i, image in enumerate(drawn):
        image.save(tmp_path / f"{i}.png")
    for source in (tmp_path, drawn, iter(drawn), sorted(tmp_path.iterdir())):
        assert measure(PixelStub(odd_network), scheduler, source).total == expected


def test_grey_pictures():
    images, scheduler = pictures(channels=1), schedule()
    expected = measure(PixelStub(odd_network, channels=1), scheduler, images).total
    grey = [Image.fromarray(image[0].numpy()) for image in images]
    assert measure(PixelStub(odd_network, channels=1), scheduler, grey).total == expected
    coloured = [image.convert("RGB") for image in grey]
    assert measure(PixelStub(odd_network, channels=1), scheduler, coloured).total == expected


# -- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": pictures().float()}, r"float32 \[6, 3, 4, 4\].*quantize"),
        ({"images": pictures(channels=1)}, r"shape \[n, 3, h, w\].*\[6, 1, 4, 4\]"),
        ({"images": pictures(size=5)}, "images are 5x5; the network expects 4x4"),
        ({"images": pictures(n=0)}, r"n > 0"),
        ({"images": []}, "no images"),
        ({"class_labels": [0] * 6}, "no class embeddings"),
        ({"timesteps_per_image": 1}, r"timesteps_per_image=1 must lie in \[2, 20\]"),
        ({"timesteps_per_image": 21}, r"timesteps_per_image=21 must lie in \[2, 20\]"),
        ({"batch_size": 0}, "batch_size must be at least 1 .*batch_size=0"),
        ({"scheduler": DDPMScheduler()}, "DDPMScheduler is not a scheduler of this package"),
        ({"scheduler": schedule(1, rescale_betas_zero_snr=False)}, "num_train_timesteps=1"),
        (
            {"unet": PixelStub(odd_network, channels=4)},
            "from 4 to 4 channels; bits/dim is defined for pixel-space models",
        ),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_calls_are_refused_before_the_network_runs(changes, message):
    arguments = {"unet": PixelStub(odd_network), "scheduler": schedule(), "images": pictures(), **changes}
    with pytest.raises(ValueError, match=message):
        bits_per_dim(**arguments)
    assert not arguments["unet"].calls


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"class_labels has shape \[2\] for 6 images"),
        ([], r"class_labels has shape \[0\]"),
        ([0, 1, 2, 3, 4, 0], r"class_labels has 4; this network has 0 to 2, and 3 for no class"),
        (-1, r"class_labels has -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    unet = PixelStub(odd_network)
    unet.config.num_class_embeds = 4
    with pytest.raises(ValueError, match=message):
        measure(unet, schedule(), pictures(), labels)
    assert not unet.calls


def test_it_says_what_it_found():
    result = BitsPerDim(3.75, 0.01, 0.0, np.array([1.97, 1.0, 0.78]), 50, "fixed_large")
    assert str(result) == (
        "bits/dim: at most 3.7500 ± 0.0100 over 50 images (prior 0.0000, steps 1.7800, decoder 1.9700; fixed_large)"
    )

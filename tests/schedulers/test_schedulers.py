import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from oracles import (
    BETAS,
    CLASSES,
    MEAN,
    POINT,
    SD,
    SPREAD,
    levels,
    make,
    nonlinear,
    oracle,
    posterior_mean,
    sample,
    seeded,
    start,
)

from zsnr_diffusers import (
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
)
from zsnr_diffusers.core import alpha_bar_table

# -- closed forms


@pytest.mark.full
@pytest.mark.parametrize("T", [100, 1000, 1024])
@pytest.mark.parametrize("cls", [ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler])
def test_every_number_of_steps_reaches_the_point_and_the_mean(cls, T):
    """A point mass is reached from any noise, and the mean of Gaussian data from the mean of the noise.

    At eta = 1 (DDPM) the point mass gets fresh noise at each step and still is reached; the Gaussian's mean gets none.
    By the factors that `step` multiplies with: the loop through `step` itself takes minutes for the same.
    """
    scheduler, (alphas, sigmas) = cls(num_train_timesteps=T, **SD), levels(T)
    missed = []
    for n in range(1, T + 1):
        scheduler.set_timesteps(n)
        updates = scheduler._updates_from(0, scheduler._eta)
        point, gaussian = 2.0, 0.0
        for t, (keep, (gain,), noise) in zip(scheduler.timesteps.tolist(), updates, strict=True):
            x_0 = posterior_mean(gaussian, alphas[t], sigmas[t], MEAN, SPREAD**2)
            point, gaussian = keep * point + gain * POINT + noise * 1.3, keep * gaussian + gain * x_0
        if not (abs(point - POINT) < 1e-12 and abs(gaussian - MEAN) < 1e-9):
            missed.append((n, point, gaussian))
    assert not missed


@pytest.mark.parametrize("T", [100, 1000, 1024])
@pytest.mark.parametrize("cls", [ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler])
def test_steps_reach_the_point_and_the_mean(cls, T):
    scheduler, network = cls(num_train_timesteps=T, **SD), oracle(T)
    fresh = torch.tensor([1.3, 0.0], dtype=torch.float64)
    extra = {"variance_noise": fresh} if cls is ZeroSNRDDPMScheduler else {}
    for n in (*range(1, 33), 61, 99, 100):
        x = sample(scheduler, torch.tensor([2.0, 0.0], dtype=torch.float64), network, n, **extra)
        assert abs(x[0] - POINT) < 1e-12
        assert abs(x[1] - MEAN) < 1e-9


@pytest.mark.full
def test_eta_one_is_finite_for_every_number_of_steps():
    """Stock is NaN at 717 of these: a -1e-8 under a root."""
    scheduler, network = ZeroSNRDDIMScheduler(**SD), oracle(1000)
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        x = torch.tensor([2.0, 1.0], dtype=torch.float64)
        for t in scheduler.timesteps[:2].tolist():
            x = scheduler.step(network(x, t), t, x, eta=1.0, variance_noise=torch.ones_like(x)).prev_sample
        assert bool(x.isfinite().all()), n
    stock = DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", **SD)
    stock.set_timesteps(25)
    assert bool(stock.step(torch.ones(2), 999, torch.ones(2), eta=1.0, variance_noise=torch.ones(2))[0].isnan().any())


def test_ddim_converges_with_order_one_from_zero_snr():
    """Gaussian data has an exact flow: x_0 = mean + spread * (noise). The error must halve when the steps double."""
    network = oracle(1000)
    errors = []
    for n in (50, 100, 200):
        x = sample(ZeroSNRDDIMScheduler(**SD), torch.tensor([0.0, 1.0], dtype=torch.float64), network, n)
        errors.append(abs(x[1].item() - (MEAN + SPREAD)))
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_ddpm_samples_have_the_data_s_spread():
    network = oracle(1000)
    generator = seeded(0)
    x = torch.randn(20000, 2, dtype=torch.float64, generator=generator)
    x = sample(ZeroSNRDDPMScheduler(**SD), x, network, 200, generator=generator)
    assert x[:, 1].mean().item() == pytest.approx(MEAN, abs=4 * SPREAD / 20000**0.5)
    assert x[:, 1].std().item() == pytest.approx(
        SPREAD, rel=0.03
    )  # first-order bias at 200 steps, and 0.5 % of chance


# -- against stock, on the unrescaled schedule, where stock is right

KEPT = {**SD, "rescale_betas_zero_snr": False}
DIVISORS = [n for n in range(2, 1001) if 1000 % n == 0]


def both(ours, stock, n, **kwargs):
    return [
        sample(s, start(1, 4, seed=n, dtype=torch.float64), nonlinear, n, generator=seeded(1), **kwargs)
        for s in (ours, stock)
    ]


@pytest.mark.full
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_equals_stock_ddim(prediction_type, eta, spacing):
    """At every n that divides T; elsewhere stock steps to t - T // n, which is not its next timestep.

    Stock's own float32 table costs it 1e-5 within some 100 steps; on a float64 table both agree to the last digits.
    """
    config = {**BETAS, "prediction_type": prediction_type, "timestep_spacing": spacing}
    ours, stock = (
        ZeroSNRDDIMScheduler(rescale_betas_zero_snr=False, **config),
        DDIMScheduler(clip_sample=False, **config),
    )
    for n in (n for n in DIVISORS if n <= 100):
        torch.testing.assert_close(*both(ours, stock, n, eta=eta), rtol=1e-5, atol=1e-5)
    stock.alphas_cumprod = alpha_bar_table(**BETAS)
    stock.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    for n in DIVISORS:
        torch.testing.assert_close(*both(ours, stock, n, eta=eta), rtol=1e-9, atol=1e-9)


# With the large variance stock adds noise in the last step too, unless that is at timestep 0.
@pytest.mark.parametrize(
    ("n", "variance_type"), [*[(n, "fixed_small") for n in (2, 7, 10, 50, 333, 1000)], (1000, "fixed_large")]
)
def test_equals_stock_ddpm(n, variance_type):
    ours = ZeroSNRDDPMScheduler(**KEPT, variance_type=variance_type)
    stock = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", variance_type=variance_type, **SD)
    if n <= 333:  # beyond, stock's own float32 table costs it more
        torch.testing.assert_close(*both(ours, stock, n), rtol=1e-5, atol=1e-5)
    stock.alphas_cumprod, stock.one = alpha_bar_table(**BETAS), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(*both(ours, stock, n), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [2, 7, 10, 50, 333, 1000])
@pytest.mark.parametrize(
    ("cls", "stock_cls"),
    [(ZeroSNRDDIMScheduler, EulerDiscreteScheduler), (ZeroSNRDDPMScheduler, EulerAncestralDiscreteScheduler)],
)
def test_equals_stock_euler(cls, stock_cls, n):
    """Euler keeps x / alpha; its network sees `scale_model_input` of it, which is x."""
    alphas, _ = levels(zero_snr=False)
    stock = stock_cls(timestep_spacing="trailing", **SD)
    stock.set_timesteps(n)
    x = start(1, 4, seed=n, dtype=torch.float64)
    y, generator = x / alphas[-1], seeded(1)
    for t in stock.timesteps:
        seen = stock.scale_model_input(y, t)
        y = stock.step(nonlinear(seen, int(t)), t, y, generator=generator).prev_sample
    ours = sample(cls(**KEPT), x, nonlinear, n, generator=seeded(1))
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)


# -- the higher orders, inversion, and distilled models


def gaussian_error(scheduler, n):
    """RMS distance from where the exact flow of Gaussian data takes an image of noise."""
    noise = torch.randn(1, 500, 2, dtype=torch.float64, generator=seeded(0))
    x = sample(scheduler, noise, oracle(1000), n)
    return (x - (MEAN + SPREAD * noise))[..., 1].square().mean().sqrt().item()


@pytest.mark.parametrize(("eta", "reference"), [(0.0, "ddim"), (1.0, "ddpm")])
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_multistep_of_order_one_is_ddim_and_ddpm(eta, reference, n):
    config = {"solver_order": 1, "corrector": False, "eta": eta, "timestep_spacing": "trailing"}
    torch.testing.assert_close(*both(make("multistep", **config), make(reference), n), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [ZeroSNRMultistepScheduler, FlowMatchMultistepScheduler])
def test_fewer_than_twenty_steps_are_of_order_two_at_most(cls):
    for n in range(1, 31):
        default, second = cls(), cls(solver_order=2)
        for scheduler in (default, second):
            scheduler.set_timesteps(n)
        same = default._plan_from(0, 0.0) == second._plan_from(0, 0.0)
        assert same is (n < 20)
        assert max(len(update.gains) for update in default._plan_from(0, 0.0)[0]) <= 3 + (n >= 20)


@pytest.mark.parametrize(("name", "times"), [("multistep", 20), ("multistep-order-2", 20), ("pndm", 5)])
def test_higher_order_pays_in_twenty_steps(name, times):
    assert times * gaussian_error(make(name), 20) < gaussian_error(make("ddim"), 20)


def test_multistep_sde_samples_have_the_data_s_spread_in_forty_steps():
    x = torch.randn(20000, 2, dtype=torch.float64, generator=seeded(0))
    off = {}
    for name in ("multistep-sde", "ddpm"):
        result = sample(make(name), x, oracle(1000), 40, generator=seeded(1))[:, 1]
        off[name] = abs(result.std().item() / SPREAD - 1)
        assert result.mean().item() == pytest.approx(MEAN, abs=4 * SPREAD / 20000**0.5)
    assert off["multistep-sde"] < 4 / 40000**0.5 < off["ddpm"]  # four standard errors of a standard deviation


def test_inversion_finds_the_noise_and_ddim_leads_back():
    """The noise is found to the order of the first level, which shrinks with 1 / n, and the way back to a higher one.

    Stock holds the output of a neighbouring level fixed; its round trip misses by several times more.
    """
    network, x = oracle(1000), torch.tensor([POINT, MEAN + SPREAD], dtype=torch.float64)
    config = {**SD, "clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found, back = {}, {}
    for n in (25, 50, 100, 200):
        noise = sample(make("inverse"), x, network, n)
        found[n], back[n] = abs(noise[1].item() - 1), abs((sample(make("ddim"), noise, network, n) - x)[1].item())
        noise = sample(DDIMInverseScheduler(**config), x, network, n)
        assert abs((sample(DDIMScheduler(**config), noise, network, n) - x)[1].item()) > 10 * back[n]
    for n in (25, 50, 100):
        assert 1.8 < found[n] / found[2 * n] < 2.6
        assert back[n] > 2.4 * back[2 * n]


@pytest.mark.parametrize("n", range(1, 9))
def test_equals_stock_lcm(n):
    """At most 7e-6 is stock's boundary scaling; its float32 table is replaced by ours."""
    ours, stock = make("lcm"), LCMScheduler(clip_sample=False, rescale_betas_zero_snr=True, **SD)
    stock.alphas_cumprod, stock.final_alpha_cumprod = ours._table, torch.ones((), dtype=torch.float64)
    stock.set_timesteps(n)
    ours.set_timesteps(n)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    for t in ours.timesteps:
        v, x = torch.rand(2, 100, dtype=torch.float64, generator=seeded(n)) * 2 - 1
        results = [s.step(v, t, x, generator=seeded(1), return_dict=False) for s in (ours, stock)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("original", "strength"), [(None, 0.5), (100, 1.0), (20, 0.69)])
def test_lcm_visits_stock_s_timesteps_of_image_to_image_too(original, strength):
    ours, stock = make("lcm"), LCMScheduler(rescale_betas_zero_snr=True, **SD)
    for n in range(1, 9):
        for s in (ours, stock):
            s.set_timesteps(n, original_inference_steps=original, strength=strength)
        assert ours.timesteps.tolist() == stock.timesteps.tolist()


# -- options of their own


@pytest.mark.parametrize(
    ("ours", "config", "message"),
    [
        *((cls, {"num_train_timesteps": 1}, "at least two") for cls in CLASSES if cls is not ZeroSNRLCMScheduler),
        (ZeroSNRLCMScheduler, {"num_train_timesteps": 1, "original_inference_steps": 1}, "at least two"),
        *((ZeroSNRMultistepScheduler, {"solver_order": x}, f"solver_order={x} .* 1, 2 or 3") for x in (0, 4, 2.5)),
        *((ZeroSNRMultistepScheduler, {"eta": x}, rf"eta={x} must lie in \[0, 1\]: 0 is") for x in (-0.1, 1.1)),
        *(
            (ZeroSNRLCMScheduler, {"original_inference_steps": x}, rf"_steps={x} must lie in \[1, 1000\]")
            for x in (0, -1, 1001)
        ),
    ],
)
def test_bad_options_are_refused_when_it_is_made(ours, config, message):
    with pytest.raises(ValueError, match=message):
        ours(**{**SD, **config})


@pytest.mark.parametrize("steps", [40, 50])
def test_the_timesteps_that_a_model_was_distilled_at_are_a_fact_of_the_model(steps):
    stock = LCMScheduler(original_inference_steps=steps, **SD)
    assert ZeroSNRLCMScheduler.from_config(stock.config).config.original_inference_steps == steps

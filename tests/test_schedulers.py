import copy
import inspect
import json
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler, enforce_zero_terminal_snr
from zsnr_diffusers.core import alpha_bar_table

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {**BETAS, "prediction_type": "v_prediction"}
OURS = [ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler]


def levels(num_train_timesteps=1000, zero_snr=True):
    """alpha and sigma of every timestep, float64, straight from the core."""
    table = alpha_bar_table(num_train_timesteps=num_train_timesteps, **BETAS)
    table = enforce_zero_terminal_snr(table) if zero_snr else table
    return table.sqrt().tolist(), (1 - table).sqrt().tolist()


def sample(scheduler, x, network, n, **kwargs):
    """The loop of a pipeline; `network(x, t)` returns the model output."""
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, return_dict=False, **kwargs)[0]
    return x


# -- closed forms

POINT, MEAN, SPREAD = 0.7, -0.4, 2.0


def oracle(num_train_timesteps):
    """v of the exact posterior mean for a point mass (sample 0) and for Gaussian data (sample 1)."""
    alphas, sigmas = levels(num_train_timesteps)
    prior = torch.tensor([POINT, MEAN], dtype=torch.float64)
    variance = torch.tensor([0.0, SPREAD**2], dtype=torch.float64)

    def network(x, t):
        alpha, sigma = alphas[t], sigmas[t]
        x_0 = prior + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * prior)
        return alpha * (x - alpha * x_0) / sigma - sigma * x_0

    return network


@pytest.mark.parametrize("T", [100, 1000, 1024])
@pytest.mark.parametrize("cls", OURS)
def test_every_number_of_steps_reaches_the_point_and_the_mean(cls, T):
    """A point mass is reached from any noise, and the mean of Gaussian data from the mean of the noise.

    At eta = 1 (DDPM) the point mass gets fresh noise at each step and still is reached; the Gaussian's mean gets none.
    """
    scheduler, network = cls(num_train_timesteps=T, **SD), oracle(T)
    fresh = torch.tensor([1.3, 0.0], dtype=torch.float64)
    extra = {"variance_noise": fresh} if cls is ZeroSNRDDPMScheduler else {}
    missed = []
    for n in range(1, T + 1):
        x = sample(scheduler, torch.tensor([2.0, 0.0], dtype=torch.float64), network, n, **extra)
        if not (abs(x[0] - POINT) < 1e-12 and abs(x[1] - MEAN) < 1e-9):
            missed.append((n, x.tolist()))
    assert not missed


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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 2, dtype=torch.float64, generator=generator)
    x = sample(ZeroSNRDDPMScheduler(**SD), x, network, 200, generator=generator)
    assert x[:, 1].mean().item() == pytest.approx(MEAN, abs=4 * SPREAD / 20000**0.5)
    assert x[:, 1].std().item() == pytest.approx(
        SPREAD, rel=0.03
    )  # first-order bias at 200 steps, and 0.5 % of chance


# -- against stock, on the unrescaled schedule, where stock is right

KEPT = {**SD, "rescale_betas_zero_snr": False}
DIVISORS = [n for n in range(2, 1001) if 1000 % n == 0]


def nonlinear(x, t):
    return torch.sin(x + 0.001 * t) - 0.2 * x


def start(n):
    return torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def both(ours, stock, n, **kwargs):
    return [
        sample(s, start(n), nonlinear, n, generator=torch.Generator().manual_seed(1), **kwargs) for s in (ours, stock)
    ]


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


@pytest.mark.parametrize("n", [2, 7, 10, 50, 333, 1000])
def test_equals_stock_ddpm(n):
    ours, stock = ZeroSNRDDPMScheduler(**KEPT), DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **SD)
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
    x = start(n)
    y, generator = x / alphas[-1], torch.Generator().manual_seed(1)
    for t in stock.timesteps:
        seen = stock.scale_model_input(y, t)
        y = stock.step(nonlinear(seen, int(t)), t, y, generator=generator).prev_sample
    ours = sample(cls(**KEPT), x, nonlinear, n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)


def test_noising_equals_stock_and_is_right_in_half_precision():
    ours, stock = ZeroSNRDDIMScheduler(**KEPT), DDIMScheduler(**SD)
    x, noise, t = torch.randn(1000, 4), torch.randn(1000, 4), torch.arange(1000)
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), rtol=1e-5, atol=1e-5)
    ours = ZeroSNRDDIMScheduler(**SD)
    for dtype in (torch.float16, torch.bfloat16):
        for method in (ours.add_noise, ours.get_velocity):
            half, exact = method(x.to(dtype), noise.to(dtype), t), method(x.to(dtype).double(), noise.to(dtype), t)
            assert half.dtype == dtype
            torch.testing.assert_close(half, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(ours.add_noise(x[:1], noise[:1], torch.tensor([999])), noise[:1])


# -- from_config and saving


def stock_schedulers():
    """Every scheduler of the installed diffusers that takes betas."""
    for name in dir(diffusers):
        if not name.endswith("Scheduler"):
            continue
        member = getattr(diffusers, name)
        module = getattr(member, "__module__", "")
        if "dummy" in module or "flax" in name.lower():
            continue
        if "beta_schedule" in inspect.signature(member.__init__).parameters:
            yield member


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("stock_cls", list(stock_schedulers()), ids=lambda c: c.__name__)
@pytest.mark.parametrize("explicit", [True, False])
def test_from_any_stock_config_ends_at_zero_snr_and_visits_the_last_timestep(ours, stock_cls, explicit):
    accepted = inspect.signature(stock_cls.__init__).parameters
    stock = stock_cls(
        **({k: v for k, v in BETAS.items() if k in accepted and "beta_start" in accepted} if explicit else {})
    )
    scheduler = ours.from_config(stock.config, prediction_type="v_prediction", clip_sample=False)
    assert scheduler.alphas_cumprod[-1] == 0
    for fact in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert scheduler.config[fact] == stock.config.get(fact, scheduler.config[fact])
    for n in (1, 5, 61, 1000):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert scheduler.timesteps[0] == 999


def test_there_are_many_stock_schedulers():
    assert len(list(stock_schedulers())) >= 15


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_config_of_another_kind_of_model_is_refused(name):
    stock = getattr(diffusers, name)()
    for config in (stock.config, json.loads(stock.to_json_string())):
        with pytest.raises(ValueError, match="has no betas"):
            ZeroSNRDDIMScheduler.from_config(config)


def test_learned_variance_is_refused_and_other_samplers_flags_are_named(caplog):
    with pytest.raises(ValueError, match="variance_type='learned_range'"):
        ZeroSNRDDPMScheduler.from_config(DDPMScheduler(variance_type="learned_range", **SD).config)
    diffusers.utils.logging.enable_propagation()
    try:
        ZeroSNRDDIMScheduler.from_config(EulerDiscreteScheduler(use_karras_sigmas=True, **SD).config)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "use_karras_sigmas" in caplog.text


@pytest.mark.parametrize("stock_cls", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_back_to_stock_in_memory_keeps_zero_snr_and_spacing(stock_cls):
    """Stock drops what an in-memory config marks as default; ours marks nothing."""
    back = stock_cls.from_config(ZeroSNRDDIMScheduler(**SD).config)
    assert back.config.rescale_betas_zero_snr is True
    assert back.config.timestep_spacing == "trailing"
    assert back.config.prediction_type == "v_prediction"
    assert back.config.get("clip_sample", False) is False
    assert back.alphas_cumprod[-1] <= 2**-24


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}])
def test_save_and_load_keep_everything(cls, changes, tmp_path):
    scheduler = cls(**{**SD, **changes})
    scheduler.save_pretrained(tmp_path)
    for other in (
        cls.from_pretrained(tmp_path),
        cls.from_config(scheduler.config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        mine, theirs = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (scheduler, other))
        assert mine == theirs
        assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert saved["rescale_betas_zero_snr"] is changes.get("rescale_betas_zero_snr", True)


def test_gaps_in_a_file_are_filled_with_the_defaults_of_the_class_that_wrote_it():
    scheduler = ZeroSNRDDIMScheduler.from_config({"_class_name": "LCMScheduler", "prediction_type": "v_prediction"})
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.beta_end == 0.012


@pytest.mark.parametrize("cls", OURS)
def test_from_one_of_ours_to_another_in_memory_keeps_every_choice(cls):
    chosen = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading", "prediction_type": "epsilon"}
    other = cls.from_config(ZeroSNRDDIMScheduler(**BETAS, **chosen).config)
    assert {key: other.config[key] for key in chosen} == chosen
    assert other.config["_class_name"] == cls.__name__


def test_larger_variance_is_named_as_not_carried_over(caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        ZeroSNRDDPMScheduler.from_config(DDPMScheduler(variance_type="fixed_large", **SD).config)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "variance_type" in caplog.text


def test_schedule_is_kept_on_request():
    stock = DDIMScheduler(**BETAS)
    scheduler = ZeroSNRDDIMScheduler.from_config(stock.config, rescale_betas_zero_snr=False)
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=0)
    assert scheduler.config.prediction_type == "epsilon"


def test_config_without_prediction_type_is_an_epsilon_model_and_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot be used"):
        ZeroSNRDDIMScheduler.from_config(BETAS)


def test_assigning_on_the_config_is_an_error_rather_than_a_half_change(tmp_path):
    scheduler = ZeroSNRDDIMScheduler(**{**SD, "prediction_type": "sample"})
    scheduler.config.prediction_type = "v_prediction"
    for call in (lambda: scheduler.set_timesteps(5), lambda: scheduler.save_pretrained(tmp_path)):
        with pytest.raises(
            ValueError, match=r"prediction_type was assigned .*from_config\(scheduler.config, prediction"
        ):
            call()


# -- the contract of a scheduler


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(cls, dtype):
    scheduler = cls(**SD)
    for n in (1, 7, 50):
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            v, x, w = torch.randn(3, 2, 4, 8, 8).to(dtype)
            result = scheduler.step(v, t, x, variance_noise=w)
            exact = scheduler.step(v.double(), t, x.double(), variance_noise=w.double())
            assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                result.prev_sample.double(), exact.prev_sample, rtol=eps, atol=max(eps / 100, 1e-6)
            )


@pytest.mark.parametrize("cls", OURS)
def test_step_reads_no_value_from_the_device(cls):
    """A meta tensor has no values, so whatever would wait for one raises."""
    scheduler = cls(**SD)
    scheduler.set_timesteps(20, device="meta")
    x = torch.randn(1, 4, 8, 8, device="meta")
    for t in scheduler.timesteps[3:]:
        x = scheduler.step(torch.empty_like(x), t, x, variance_noise=torch.empty_like(x)).prev_sample
    assert x.shape == (1, 4, 8, 8)
    noisy = scheduler.add_noise(x, torch.empty_like(x), scheduler.timesteps[3:4])
    assert noisy.device.type == "meta"


def test_views_of_the_timesteps_know_their_place():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    scheduler.set_timesteps(20, device="meta")
    assert [scheduler._index(t) for t in scheduler.timesteps[5:]] == list(range(5, 20))
    scheduler.set_timesteps(20)
    assert [scheduler._index(t) for t in scheduler.timesteps.clone()[5:]] == list(range(5, 20))
    assert scheduler._index(999) == 0


def test_steps_may_be_taken_in_any_order_and_twice():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    scheduler.set_timesteps(10)
    x, v = torch.randn(2, 3)
    once = [scheduler.step(v, t, x).prev_sample for t in scheduler.timesteps]
    again = [scheduler.step(v, t, x).prev_sample for t in scheduler.timesteps.flip(0)]
    assert all(map(torch.equal, once, reversed(again)))


def test_own_timesteps():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    scheduler.set_timesteps(timesteps=[999, 700, 20])
    assert scheduler.timesteps.tolist() == [999, 700, 20]
    assert scheduler.num_inference_steps == 3
    x, network = torch.tensor([2.0, 0.0], dtype=torch.float64), oracle(1000)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(x, torch.tensor([POINT, MEAN], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 300), st.floats(0, 1), st.sampled_from(["trailing", "linspace"]))
def test_point_mass_for_any_model_steps_and_eta(data, T, eta, spacing):
    n = data.draw(st.integers(1, T))
    scheduler = ZeroSNRDDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing, **SD)
    network = oracle(T)
    x = sample(scheduler, torch.tensor([2.0, 0.0], dtype=torch.float64), network, n, eta=eta)
    assert x[0].item() == pytest.approx(POINT, abs=1e-12)


def test_clipping_holds_each_predicted_x_0():
    scheduler = ZeroSNRDDIMScheduler(clip_sample=True, clip_sample_range=0.5, **{**SD, "prediction_type": "sample"})
    scheduler.set_timesteps(4)
    result = scheduler.step(torch.tensor([3.0, 0.1]), 999, torch.zeros(2))
    assert result.pred_original_sample.tolist() == pytest.approx([0.5, 0.1])
    x_s = scheduler.add_noise(torch.tensor([0.5, 0.1]), torch.zeros(2), torch.tensor([749]))
    torch.testing.assert_close(result.prev_sample, x_s)


def test_generators_decide_the_noise_one_for_all_or_one_each():
    scheduler = ZeroSNRDDPMScheduler(**SD)
    scheduler.set_timesteps(5)
    x = torch.zeros(2, 3)

    def run(generator):
        return scheduler.step(x, 999, x, generator=generator).prev_sample

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(run(seeded(3)), run(seeded(3)))
    assert not torch.equal(run(seeded(3)), run(seeded(4)))
    each = run([seeded(3), seeded(4)])
    assert torch.equal(run([seeded(4), seeded(3)]), each.flip(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.step(torch.ones(1), 999, torch.ones(1)), "Call set_timesteps"),
        (lambda s: s.set_timesteps(0), "num_inference_steps=0"),
        (lambda s: s.set_timesteps(1001), "num_inference_steps=1001"),
        (lambda s: s.set_timesteps(), "either num_inference_steps or timesteps"),
        (lambda s: s.set_timesteps(3, timesteps=[5]), "either num_inference_steps or timesteps"),
        (lambda s: s.add_noise(torch.ones(1), torch.ones(1), torch.tensor([1000])), r"\[0, 999\]"),
        (lambda s: s.add_noise(torch.ones(1), torch.ones(1), torch.tensor([-1])), r"\[0, 999\]"),
        (
            lambda s: (s.set_timesteps(10), s.step(torch.ones(1), 998, torch.ones(1))),
            "timestep 998 is not among the 10",
        ),
        (lambda s: (s.set_timesteps(10), s.step(torch.ones(1), 999, torch.ones(1), eta=2)), "eta=2"),
        (
            lambda s: (
                s.set_timesteps(10),
                s.step(torch.ones(1), 999, torch.ones(1), generator=torch.Generator(), variance_noise=torch.ones(1)),
            ),
            "not both",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(ZeroSNRDDIMScheduler(**SD))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type='flow' is not known"),
        ({"prediction_type": "epsilon"}, "zero signal-to-noise"),
        ({"timestep_spacing": "leading"}, "never visits the last timestep"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is not known"),
        ({"trained_betas": [0.1, 0.2]}, "2 values for num_train_timesteps=1000"),
        ({"num_train_timesteps": 1}, "at least two"),
    ],
)
def test_bad_config_is_refused_when_it_is_made(config, message):
    with pytest.raises(ValueError, match=message):
        ZeroSNRDDIMScheduler(**{**SD, **config})


def test_the_class_itself_takes_little_to_import():
    """A scheduler alone must not wait for transformers."""
    code = "import sys, zsnr_diffusers; print('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

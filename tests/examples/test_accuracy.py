"""The studies of accuracy on a very small setting: what they report against closed forms and direct computation."""

import json
import math
import sys
from itertools import pairwise

import accuracy_flow
import accuracy_sde
import guided_accuracy
import pytest
import sampler_accuracy
import torch
from accuracy_bench import Bench
from accuracy_study import STUDIED, constants, study
from exact_denoisers import Gaussian, Guided, Mixture, integrated
from rivals import FlowLMSScheduler
from samplers import DEFAULT, FLOW_DEFAULT, USUAL, USUAL_RIVALS, Sampler, sample, stock_flow_samplers, stock_samplers
from suites import Suite, guided_pairs, guided_suite, ode_suite

from zsnr_diffusers import (
    FlowMatchEulerScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRMultistepScheduler,
)

pytestmark = pytest.mark.full

OURS = DEFAULT.label
QUICK = ["--candidates", "usual", "--samples", "2", "--exact_steps", "240"]


def by_hand(scheduler, x_0, noise, n, schedule):
    """A row of results [N, d]; `x_0(x_t, alpha, sigma)` is the denoiser, and v is alpha eps - sigma x_0."""
    scheduler.set_timesteps(n)
    x = noise
    for t in scheduler.timesteps:
        alpha, sigma = schedule[t].sqrt().item(), (1 - schedule[t]).sqrt().item()
        clean = x_0(x, alpha, sigma)
        v = alpha * (x - alpha * clean) / sigma - sigma * clean
        x = scheduler.step(v, t, x).prev_sample
    return x


def ddim_by_hand(x_0, noise, timesteps, schedule):
    """The first-order update written out."""
    x = noise
    levels = [(schedule[t].sqrt().item(), (1 - schedule[t]).sqrt().item()) for t in timesteps] + [(1.0, 0.0)]
    for (alpha, sigma), (next_alpha, next_sigma) in pairwise(levels):
        clean = x_0(x, alpha, sigma)
        x = next_alpha * clean + next_sigma * (x - alpha * clean) / sigma
    return x


def gaussian_x_0(std, mean=0.0):
    """E[x_0 | x_t] of N(mean, std^2), by the formula for two Gaussians' product."""
    return lambda x, alpha, sigma: (mean * sigma**2 + alpha * std**2 * x) / (sigma**2 + alpha**2 * std**2)


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def unguided(tmp_path_factory):
    """The report of `sampler_accuracy.py` on 5 and 8 steps, with 2 samples per mixture."""
    import diffusers

    folder, verbosity = tmp_path_factory.mktemp("unguided"), diffusers.utils.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_accuracy, "CURVE", (4, 6))
        sampler_accuracy.main([*QUICK, "--steps", "5", "8", "--sde_samples", "0", "--output_dir", str(folder)])
    diffusers.utils.logging.set_verbosity(verbosity)
    assert all((folder / name).stat().st_size > 10_000 for name in ("error.png", "recovered.png"))
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """The report of `guided_accuracy.py` without guidance and at 3, on 5 and 6 steps, with a sample of each case."""
    import diffusers

    folder, verbosity = tmp_path_factory.mktemp("guided"), diffusers.utils.logging.get_verbosity()
    options = ["--guidance_scales", "1", "3", "--steps", "5", "6", "--samples", "1", "--output_dir", str(folder)]
    guided_accuracy.main([*QUICK, *options])
    diffusers.utils.logging.set_verbosity(verbosity)
    assert (folder / "guided.png").stat().st_size > 10_000
    return json.loads((folder / "report.json").read_text())


def test_our_first_order_is_ddim_of_stock(unguided):
    """On trailing steps, whatever the data; stock's table is float32."""
    figures = unguided["figures"]
    for n in ("5", "8"):
        for same in ("ZeroSNRDDIM trailing", "ZeroSNRMultistep trailing order 1 no corrector"):
            assert figures[same][n] == pytest.approx(figures["DDIM trailing"][n], rel=1e-3)


def test_ddim_on_gaussians_in_closed_form(unguided, schedule):
    """Its result is the noise, here ones, times a product over steps; the exact one is the standard deviation."""
    bands = torch.logspace(math.log10(0.05), math.log10(32), 80, dtype=torch.float64).split(8)
    for std in (bands[0], bands[-1]):
        end = ddim_by_hand(gaussian_x_0(std), torch.ones_like(std), [999, 799, 599, 399, 199], schedule)
        found = unguided["cases"]["ZeroSNRDDIM trailing"]["5"][f"scales {std[0]:.2g} to {std[-1]:.2g}"]
        assert found == pytest.approx(rms((end - std) / std), rel=1e-6)


def test_our_sampler_on_a_mixture_by_hand(unguided, schedule):
    suite = ode_suite(schedule, 0, 2)
    place, case = next((i, c) for i, c in enumerate(suite.cases) if not c.is_gaussian and c.means.shape[1] == 4)
    noise = suite.split(suite.noise)[place]

    def x_0(x, alpha, sigma):
        """By the densities of the modes' noisy samples."""
        variance = alpha**2 * case.stds**2 + sigma**2
        density = torch.distributions.Normal(alpha * case.means, variance.sqrt()[:, None])
        weights = (case.weights.log() + density.log_prob(x[:, None]).sum(2)).softmax(1)[..., None]
        means = case.means + (alpha * case.stds**2 / variance)[:, None] * (x[:, None] - alpha * case.means)
        return (weights * means).sum(1)

    end = by_hand(DEFAULT.prepared(8), x_0, noise, 8, schedule)
    error = rms((end - integrated(case.x_0, noise, 800)) / case.spread)
    assert unguided["cases"][OURS]["8"][case.name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["best stock", "best of anyone", "single stock"])
def test_ratios_are_those_of_the_figures(unguided, name):
    figures = unguided["figures"]
    among = {"best stock": USUAL.values(), "best of anyone": [*USUAL.values(), *USUAL_RIVALS]}
    labels = [s.label for s in among[name]] if name in among else [unguided["single stock"]]
    for n in ("5", "8"):
        expected = [figures[OURS][n][kind] / min(figures[label][n][kind] for label in labels) for kind in range(3)]
        assert unguided["ratios"][name][n] == pytest.approx(expected)
    if name == "single stock":
        means = {s.label: figures[s.label]["5"][0] * figures[s.label]["8"][0] for s in USUAL.values()}
        assert labels == [min(means, key=means.get)]


def test_the_figure_over_all_is_the_mean_of_both_kinds(unguided):
    cases = unguided["cases"][OURS]["5"]
    kinds = [
        math.exp(sum(map(math.log, values)) / len(values))
        for values in (
            [v for name, v in cases.items() if "modes" not in name],
            [v for name, v in cases.items() if "modes" in name],
        )
    ]
    assert unguided["figures"][OURS]["5"] == pytest.approx([math.sqrt(kinds[0] * kinds[1]), *kinds])
    assert unguided["exact to"] < 1e-3


@pytest.mark.slow
def test_without_guidance_gaussians_have_a_closed_form(guided, schedule):
    """Both for where the exact ODE leads, mean + std noise, and for DDIM."""
    suite, errors = guided_suite(schedule, 0, 1, 1.0), []
    for (_, data), noise in zip(guided_pairs(0), suite.split(suite.noise), strict=True):
        if data.is_gaussian:
            end = ddim_by_hand(gaussian_x_0(data.std, data.mean), noise, [999, 799, 599, 399, 199], schedule)
            errors.append(rms((end - data.mean - data.std * noise) / data.std))
    expected = math.exp(sum(map(math.log, errors)) / len(errors))
    assert guided["1"]["errors"]["DDIM trailing"]["5"][1] == pytest.approx(expected, rel=1e-3)


def test_under_guidance_our_sampler_by_hand(guided, schedule):
    suite, errors = guided_suite(schedule, 0, 1, 3.0), []
    for (u, c), noise in zip(guided_pairs(0), suite.split(suite.noise), strict=True):
        if c.is_gaussian:
            parts = gaussian_x_0(u.std), gaussian_x_0(c.std, c.mean)

            def x_0(*state, parts=parts):
                return 3 * parts[1](*state) - 2 * parts[0](*state)

            def in_y(y, kappa, x_0=x_0):
                alpha, sigma = kappa / math.hypot(1, kappa), 1 / math.hypot(1, kappa)
                return x_0(sigma * y, alpha, sigma)

            end = by_hand(DEFAULT.prepared(6), x_0, noise, 6, schedule)
            errors.append(rms((end - integrated(in_y, noise, 800)) / c.std))
    expected = math.exp(sum(map(math.log, errors)) / len(errors))
    assert guided["3"]["errors"][OURS]["6"][1] == pytest.approx(expected, rel=1e-3)


def test_guided_ratios_are_those_of_the_errors(guided):
    for scale in ("1", "3"):
        errors = guided[scale]["errors"]
        for n in ("5", "6"):
            for name in ("best stock", "best rival", "best of anyone"):
                ratio = guided["ratios"][name][scale][n]
                assert ratio[0] == pytest.approx(errors[OURS][n][0] / errors[name][n][0])
                assert ratio[1] >= errors[OURS][n][1] / errors[name][n][1] - 1e-9
            assert errors["best of anyone"][n] == min(errors["best stock"][n], errors["best rival"][n])
            assert guided[scale]["ratio"][n] == guided["ratios"]["best stock"][scale][n][0]


def test_rescale_is_algorithm_2_on_v(schedule):
    """Per sample over its dimensions, in float64; and nothing where it is off."""
    pair, kappa = guided_pairs(0)[-1], 0.8
    y = torch.randn(3, len(pair[1].spread), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = kappa / math.hypot(1, kappa), 1 / math.hypot(1, kappa)
    u, c = (each.x_0(y, kappa) for each in pair)

    def v(x_0):
        return alpha * (y - kappa * x_0) - sigma * x_0

    guided = v(u) + 5 * (v(c) - v(u))
    ratio = v(c).std(1, correction=0, keepdim=True) / guided.std(1, correction=0, keepdim=True)
    found = v(Guided(*pair, 5.0, 0.7).x_0(y, kappa))
    torch.testing.assert_close(found, 0.7 * guided * ratio + 0.3 * guided)
    torch.testing.assert_close(v(Guided(*pair, 5.0).x_0(y, kappa)), guided)
    assert len(guided_suite(schedule, 0, 1, 5.0, 0.7).cases) == len(guided_suite(schedule, 0, 1, 5.0).cases) - 3


def test_samplers_tend_to_the_exact_ode_under_rescale(schedule):
    """The sampler knows nothing of the rescale, the integrator nothing of steps: both lead to the same end."""
    pairs = [pair for pair in guided_pairs(0) if len(pair[1].spread) == 8]
    cases = [Guided(*pair, 3.0, 0.7) for pair in pairs]
    noise = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    suite = Suite(cases, [noise] * len(cases), schedule)
    exact = suite.endpoints(240)
    errors = [suite.errors(sample(DEFAULT.prepared(n), suite), exact).max().item() for n in (10, 20, 40)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    unscaled = Suite([Guided(*pair, 3.0) for pair in pairs], [noise] * len(pairs), schedule)
    other = suite.errors(sample(DEFAULT.prepared(40), unscaled), exact)
    assert other.max() > 100 * errors[2]


def test_the_study_finds_the_default_at_the_default(schedule, capsys):
    bench = Bench(ode_suite(schedule, 0, 1), 50)
    report, steps = {}, (5, 8)  # some constants are of fewer steps, others of more
    study(bench, report, steps)
    for name in STUDIED:
        default = [row for label, row in report["study"][name].items() if label.endswith("(default)")]
        assert default == [{n: bench.figures(bench.errors(DEFAULT, n)) for n in steps}]
        assert len({tuple(row.values()) for row in report["study"][name].values()}) > 1
    assert "order 2 + corrector + fit" in capsys.readouterr().out
    with constants(RIDGE=1e6):
        assert bench.figures(bench.errors(DEFAULT, 5)) == report["study"]["RIDGE"]["1e+06 (no fit)"][5]


def test_energy_distance_tells_data_from_noise_and_samplers_are_near_data(schedule, monkeypatch):
    stock = [s for s in stock_samplers(stochastic=True) if s.options == {"timestep_spacing": "trailing"}][:2]
    monkeypatch.setattr(accuracy_sde, "stock_samplers", lambda stochastic: stock)
    report = {}
    accuracy_sde.compare_sde(schedule, 0, 300, 20, report, repeats=1)
    assert {s.label for s in stock} <= set(report["sde"])
    draw = accuracy_sde._draws(schedule, 0, 300, 1)[0]
    noise = draw.distance(draw.suite.split(draw.suite.noise))
    assert abs(report["sde"][accuracy_sde.NOTHING][0]) < 0.05 * noise
    assert report["sde"]["ZeroSNRMultistep kappa order 2 eta 1"][0] < 0.1 * noise
    assert "data against data" in accuracy_sde.summary(report)


def test_flow_levels_are_those_of_the_exact_solution(tmp_path):
    """Euler's method on a Gaussian, written out."""
    suite = ode_suite(None, 0, 1)
    std, sampler = suite.cases[0].std, Sampler(FlowMatchEulerScheduler, {"timestep_spacing": "trailing"}, {})
    x = torch.ones_like(std)
    for s, r in pairwise([1.0, 0.75, 0.5, 0.25, 0.0]):
        clean = (1 - s) * std**2 * x / ((1 - s) ** 2 * std**2 + s**2)
        x = x + (r - s) * (x - clean) / s
    found = suite.split(sample(sampler.prepared(4), suite))[0][0]
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_the_flow_table_compares_with_stock_and_others(tmp_path, monkeypatch, capsys):
    few = [s for s in stock_flow_samplers() if s.options.get("shift") == 3.0 or "order 3" in s.label][:12]
    monkeypatch.setattr(accuracy_flow, "stock_flow_samplers", lambda: few)
    monkeypatch.setattr(accuracy_flow, "CURVE", (4, 5))
    options = ["--flow", "--samples", "1", "--exact_steps", "120", "--steps", "5", "--output_dir", str(tmp_path)]
    sampler_accuracy.main(options)
    report = json.loads((tmp_path / "report.json").read_text())
    ours, euler = (report["errors"][s.label]["5"] for s in (FLOW_DEFAULT, accuracy_flow.EULER))
    ratio = report["ratios"][f"{accuracy_flow.EULER.label} (stock's default)"]["5"]
    assert ratio == pytest.approx([a / b for a, b in zip(ours, euler, strict=True)])
    assert ratio[0] < 0.5
    assert (tmp_path / "flow.png").stat().st_size > 0
    assert "below 1: closer" in capsys.readouterr().out


def test_skrample_is_asked_for_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skrample", None)
    monkeypatch.delitem(sys.modules, "skrample_samplers", raising=False)
    with pytest.raises(SystemExit, match=r"pip install skrample==0\.7\.0"):
        sampler_accuracy.main(["--flow", "--skrample", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        sampler_accuracy.main(["--skrample"])


def test_lms_of_other_programs_is_exact_where_the_flow_is_a_polynomial():
    """dx / ds = 4 s^3 from 1 to 0 ends 1 lower; order 4 integrates what it has seen of it exactly from the 4th on."""
    scheduler = FlowLMSScheduler(timestep_spacing="normal", solver_order=4)
    scheduler.set_timesteps(8)
    x, exact = torch.ones(1, dtype=torch.float64), scheduler.sigmas**4
    for i, t in enumerate(scheduler.timesteps):
        s = t.double() / 1000
        before = x
        x = scheduler.step(4 * s**3 * torch.ones_like(x), t, x).prev_sample
        if i >= 3:
            torch.testing.assert_close(x - before, (exact[i + 1] - exact[i]).reshape(1), rtol=1e-9, atol=1e-12)


def test_what_stock_raises_is_noted_and_its_figure_infinite(schedule):
    class Broken(ZeroSNRDDPMScheduler):
        def step(self, *args, **kwargs):
            raise IndexError("index 7 is out of bounds")

    bench = Bench(ode_suite(schedule, 0, 1), 20)
    assert bench.errors(Sampler(Broken, {"timestep_spacing": "trailing"}), 3) is None
    assert bench.failures == [("Broken, trailing", "index # is out of bounds (step)")]
    assert bench.figures(None) == (math.inf,) * 3


def test_a_gaussian_is_a_mixture_of_one():
    std, mean = torch.tensor(0.7, dtype=torch.float64), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    y = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(4, 2)
    mixture = Mixture("", mean, std[None], torch.ones(1, dtype=torch.float64))
    gaussian = Gaussian("", std.expand(2), mean[0])
    for kappa in (0.0, 0.5, 20.0):
        torch.testing.assert_close(mixture.x_0(y, kappa), gaussian.x_0(y, kappa))
    torch.testing.assert_close(mixture.endpoint(y, 400), gaussian.endpoint(y, 1), rtol=1e-5, atol=1e-5)


def test_a_run_by_the_loop_of_the_study_is_the_run_of_a_pipeline(schedule):
    """`sample` and a plain loop over timesteps."""
    suite = guided_suite(schedule, 0, 1, 1.0)
    for cls in (ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler):
        scheduler = Sampler(cls, {"timestep_spacing": "trailing"}).prepared(4)
        x = suite.noise
        for t in [999, 749, 499, 249]:
            x = scheduler.step(suite.velocity(x, t), t, x).prev_sample
        assert torch.equal(x, sample(Sampler(cls, {"timestep_spacing": "trailing"}).prepared(4), suite))

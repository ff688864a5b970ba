"""The samplers of skrample, where it is installed, which needs Python 3.12; nothing here needs torch."""

import numpy as np
import pytest

pytest.importorskip("skrample")
from skrample_samplers import SCHEDULES, SkrampleScheduler, skrample_options


def run(options, n, network):
    scheduler = SkrampleScheduler(**options)
    scheduler.set_timesteps(n)
    x = np.array([-1.0, 0.3, 2.0])
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
    return x, scheduler


@pytest.mark.parametrize("options", skrample_options([1.5]), ids=str)
def test_a_single_point_is_reached(options):
    end, _ = run(options, 6, lambda x, s: (x - 0.7) / s)
    np.testing.assert_allclose(end, 0.7, atol=1e-9)


def test_each_schedule_starts_at_pure_noise_and_euler_is_eulers_method():
    for where in SCHEDULES:
        options = {"solver_type": "Euler", "solver_order": 1, "timestep_spacing": where, "shift": 3.0}
        end, scheduler = run(options, 5, lambda x, s: np.sin(x + s))
        assert scheduler.timesteps[0] == pytest.approx(1000)
        assert scheduler.sigmas[-1] == 0
        x = np.array([-1.0, 0.3, 2.0])
        for s, r in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False):
            x = x + (r - s) * np.sin(x + s)
        np.testing.assert_allclose(end, x, rtol=1e-12)


def test_higher_orders_are_nearer_on_a_gaussian():
    std = np.array([0.2, 0.7, 2.0])

    def network(x, s):
        clean = (1 - s) * std**2 * x / ((1 - s) ** 2 * std**2 + s**2)
        return (x - clean) / s

    exact = std * np.array([-1.0, 0.3, 2.0])
    euler, adams, unipc = (
        np.abs(run({"solver_type": kind, "solver_order": order}, 20, network)[0] - exact).max()
        for kind, order in (("Euler", 1), ("Adams", 3), ("UniPC", 3))
    )
    assert max(adams, unipc) < euler / 3

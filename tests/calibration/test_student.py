"""Weights and timesteps fitted on networks whose paths are known."""

import math

import pytest
import torch
from oracles import levels, make, posterior_mean, start

from zsnr_diffusers.calibration import refinement
from zsnr_diffusers.calibration.refinement import fit_steps, list_parameters, max_network_calls
from zsnr_diffusers.calibration.student import Student
from zsnr_diffusers.calibration.trajectory import (
    run_sampler,
    run_teacher,
    sample_in_steps,
    start_grids,
    teacher_timesteps,
)

ALPHAS, SIGMAS = levels()
HELD = {"solver_order": 1, "corrector": False}
"""Steps of one output, whose timesteps alone can be moved."""


class Network:
    """v of Gaussian data with mean 0, in the place of a pipeline's network; `spreads` of the samples."""

    num_batches, dtype = 1, torch.float32

    def __init__(self, spreads, n=16, width=8):
        self.spreads = torch.tensor(spreads).repeat_interleave(n // len(spreads))[:, None]
        self.noise, self.calls = start(n, width), 0

    def __len__(self):
        return len(self.noise)

    def __call__(self, x, t):
        self.calls += 1
        alpha, sigma = ALPHAS[t], SIGMAS[t]
        x_0 = self.x_0(x, alpha, sigma)
        return alpha * (x - alpha * x_0) / sigma - sigma * x_0

    def x_0(self, x, alpha, sigma):
        return posterior_mean(x, alpha, sigma, 0.0, self.spreads**2)


class Modes(Network):
    """Half of the mass at each of -2 and 2, with a spread."""

    def x_0(self, x, alpha, sigma):
        variance = alpha**2 * self.spreads**2 + sigma**2
        return alpha * self.spreads**2 / variance * x + sigma**2 / variance * 2 * torch.tanh(alpha * 2 * x / variance)


def student_of(network, steps, **config):
    scheduler = make("multistep", **config)
    among = teacher_timesteps(scheduler, 100, steps)
    teacher = run_teacher(network, scheduler, among)
    return Student(network, scheduler, teacher), scheduler, teacher


def spaced(scheduler, n):
    scheduler.set_timesteps(n)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_teacher_visits_what_every_student_visits(n):
    scheduler = make("multistep")
    among = teacher_timesteps(scheduler, 100, [n, 7])
    assert {*spaced(scheduler, n), *spaced(scheduler, 7)} <= {*among}
    assert all({*grid} <= {*among} for grid in start_grids(scheduler, n))
    assert among == sorted(among, reverse=True)
    assert among[0] == 999


def test_the_teacher_is_exact():
    network = Network([0.5, 2.0])
    _, _, teacher = student_of(network, [4])
    wanted = network.noise * network.spreads
    assert teacher.error(wanted) < 2e-4
    assert teacher.error(teacher.clean) < 1e-6


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_data_of_one_scale_is_fitted_exactly(n, spread):
    """All samples then run in one direction, so that one weight of each step is enough; the ridge leaves a little."""
    network = Network([spread])
    student, scheduler, teacher = student_of(network, [n])
    fit = fit_steps(student, start_grids(scheduler, n)[:1])
    default = teacher.error(sample_in_steps(network, scheduler, n))
    assert teacher.error(fit.clean) < max(default / 50, 1e-5)


def test_the_first_output_counts_for_less_where_it_overshoots():
    """As under guidance: what pure noise is told, later outputs take back."""
    network = Modes([0.5])
    plain = network.x_0
    network.x_0 = lambda x, alpha, sigma: plain(x, alpha, sigma) + 4 * math.exp(-10 * alpha / sigma)
    student, scheduler, teacher = student_of(network, [4])
    first = student.fit(start_grids(scheduler, 4)[0])
    assert first.steps.weights[0].item() < 0.9 * student.step_sizes(first.steps.timesteps)[0]
    assert first.error < teacher.error(sample_in_steps(network, scheduler, 4))


@pytest.mark.full
@pytest.mark.parametrize("config", [{}, {"solver_order": 3}, {"solver_order": 1}, {"corrector": False}, HELD])
def test_a_fit_is_what_a_scheduler_with_it_does(config):
    network = Modes([0.2, 1.0])
    student, scheduler, _ = student_of(network, [5], **config)
    fit = fit_steps(student, start_grids(scheduler, 5))
    timesteps, weights, keeps = fit.steps
    rows = [row.tolist() for row in weights]
    entry = {"timesteps": timesteps, "weights": rows, "keeps": keeps, "kappas": student.kappas(timesteps)}
    found = sample_in_steps(network, make("multistep", calibration={"5": entry}, **config), 5)
    torch.testing.assert_close(found, fit.clean, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", [Network, Modes])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_each_stage_is_nearer_to_the_teacher_than_the_one_before(kind, n):
    network = kind([0.1, 0.5, 2.0, 8.0])
    student, scheduler, teacher = student_of(network, [n])
    default = sample_in_steps(network, scheduler, n)
    starts = start_grids(scheduler, n)
    fitted = min((student.fit(grid) for grid in starts), key=lambda fit: fit.error)
    before = network.calls
    refined = fit_steps(student, starts)
    assert network.calls - before <= max_network_calls(n)
    assert teacher.error(refined.clean) == refined.error < fitted.error
    assert refined.error < 0.5 * teacher.error(default)


def test_every_grid_is_tried_before_one_is_chosen(monkeypatch):
    network = Modes([0.1, 0.5, 2.0, 8.0])
    student, scheduler, _ = student_of(network, [4])
    starts = start_grids(scheduler, 4)
    monkeypatch.setattr(refinement, "ROUNDS", 1)
    errors = [fit_steps(student, [grid]).error for grid in starts]
    assert len(set(errors)) == len(starts) == 3
    assert fit_steps(student, starts).error == min(errors)
    monkeypatch.undo()
    assert fit_steps(student, starts).error < min(errors)


def test_a_run_that_begins_as_another_takes_its_states():
    network = Modes([0.5])
    student, scheduler, _ = student_of(network, [6])
    first = student.fit(spaced(scheduler, 6))
    rows = first.steps.weights
    other = first.steps._replace(weights=[*rows[:4], 1.1 * rows[4], rows[5]])
    before = network.calls
    shared = student.run(other, first.states[:5])
    assert network.calls - before == 1
    assert torch.equal(shared.clean, student.run(other).clean)
    assert len(first.states) == len(rows) == 6  # what was shared is as it was


def test_every_weight_and_factor_and_every_timestep_but_the_first_is_a_parameter():
    parameters = list_parameters(5, 3)
    assert len({*parameters}) == len(parameters) == (1 + 2 + 3 + 3 + 3) + 5 + 4
    assert [p.step for p in parameters if p.kind == "timestep"] == [1, 2, 3, 4]


def test_samples_are_kept_as_the_network_has_them():
    network = Network([1.0])
    network.dtype = torch.float16
    scheduler = make("multistep")
    scheduler.set_timesteps(5)
    trajectory = run_sampler(network, scheduler)
    assert {x.dtype for x in trajectory.samples.values()} == {torch.float16}
    assert trajectory.clean.dtype == torch.float32

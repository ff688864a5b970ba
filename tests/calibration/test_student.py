"""Weights and timesteps fitted on networks whose paths are known."""

import pytest
import torch
from oracles import levels, make, posterior_mean, start

from zsnr_diffusers.calibration.search import CALLS, max_network_calls, search_timesteps
from zsnr_diffusers.calibration.student import Student
from zsnr_diffusers.calibration.trajectory import run_sampler, run_teacher, sample_in_steps, teacher_timesteps

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
    return Student(network, scheduler, teacher), scheduler, among, teacher


def spaced(scheduler, n):
    scheduler.set_timesteps(n)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_teacher_visits_what_every_student_visits(n):
    scheduler = make("multistep")
    among = teacher_timesteps(scheduler, 100, [n, 7])
    assert {*spaced(scheduler, n), *spaced(scheduler, 7)} <= {*among}
    assert among == sorted(among, reverse=True)
    assert among[0] == 999


def test_the_teacher_is_exact():
    network = Network([0.5, 2.0])
    _, _, _, teacher = student_of(network, [4])
    wanted = network.noise * network.spreads
    assert teacher.error(wanted) < 2e-4
    assert teacher.error(teacher.clean) < 1e-6


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_data_of_one_scale_is_fitted_exactly(n, spread):
    """All samples then run in one direction, so that one weight of each step is enough; the ridge leaves a little."""
    network = Network([spread])
    student, scheduler, _, teacher = student_of(network, [n])
    fit = student.refine_weights(student.fit(spaced(scheduler, n)))
    default = teacher.error(sample_in_steps(network, scheduler, n))
    assert teacher.error(fit.clean) < max(default / 50, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("config", [{}, {"solver_order": 3}, {"solver_order": 1}, {"corrector": False}, HELD])
def test_a_fit_is_what_a_scheduler_with_it_does(config):
    network = Modes([0.2, 1.0])
    student, scheduler, among, _ = student_of(network, [5], **config)
    fit = student.refine_weights(search_timesteps(student, spaced(scheduler, 5), among))
    entry = {"timesteps": fit.timesteps, "weights": [row.tolist() for row in fit.weights]}
    found = sample_in_steps(network, make("multistep", calibration={"5": entry}, **config), 5)
    torch.testing.assert_close(found, fit.clean, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", [Network, Modes])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_each_stage_is_nearer_to_the_teacher_than_the_one_before(kind, n):
    network = kind([0.1, 0.5, 2.0, 8.0])
    student, scheduler, among, teacher = student_of(network, [n])
    default = sample_in_steps(network, scheduler, n)
    fitted = student.fit(spaced(scheduler, n))
    before = network.calls
    searched = search_timesteps(student, fitted.timesteps, among)
    refined = student.refine_weights(searched)
    assert network.calls - before <= max_network_calls(n)
    errors = [teacher.error(result) for result in (refined.clean, searched.clean, fitted.clean)]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * teacher.error(default)


def test_what_two_fits_begin_with_is_not_computed_twice():
    network = Modes([0.5])
    student, scheduler, among, _ = student_of(network, [6])
    first = student.fit(spaced(scheduler, 6))
    other = [*first.timesteps[:4], among[among.index(first.timesteps[4]) + 1], first.timesteps[5]]
    before = network.calls
    shared = student.fit(other, like=first)
    assert network.calls - before == 2
    alone = student.fit(other)
    assert shared.error == alone.error
    assert all(map(torch.equal, shared.weights, alone.weights))
    assert len(first.states) == len(first.weights) == 6  # what was shared is as it was


def test_the_search_ends_when_its_calls_are_spent():
    network = Modes([0.1, 3.0])
    student, scheduler, among, _ = student_of(network, [4])
    timesteps = spaced(scheduler, 4)
    before = network.calls
    search_timesteps(student, timesteps, among)
    assert network.calls - before <= CALLS * 4 * 3 + 2 * 4


def test_samples_are_kept_as_the_network_has_them():
    network = Network([1.0])
    network.dtype = torch.float16
    scheduler = make("multistep")
    scheduler.set_timesteps(5)
    trajectory = run_sampler(network, scheduler)
    assert {x.dtype for x in trajectory.samples.values()} == {torch.float16}
    assert trajectory.clean.dtype == torch.float32

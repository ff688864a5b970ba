"""Whole runs of every sampler: what a user may do between steps, and where every step count must lead."""

import copy
import pickle

import pytest
import torch
from cases import thirds
from hypothesis import given, settings
from oracles import (
    MEAN,
    NOISY,
    POINT,
    SAMPLERS,
    SD,
    are_right,
    levels,
    make,
    misses,
    nonlinear,
    oracle,
    run,
    run_to_the_point,
    runs,
    sample,
    seeded,
    start,
)

from zsnr_diffusers import ZeroSNRDDIMScheduler

MEMORY = [name for name in SAMPLERS if name.startswith(("multistep", "pndm", "inverse"))]
"""Samplers whose step uses the outputs of earlier steps."""
NOTORIOUS = (61, 103, 121, 122, 501, 932, 974, 981, 995, 1000)
"""Step counts at which stock schedulers return one timestep more, or leave much noise."""
HALF = [torch.float16, torch.bfloat16]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


# -- state


@every_sampler
def test_a_generator_decides_a_run_and_samplers_without_noise_need_none(name):
    first, same, other = (sample(make(name), start(), nonlinear, 6, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, same)
    assert torch.equal(first, other) == (name not in NOISY)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@every_sampler
def test_full_loop_is_finite(name, prediction_type):
    scheduler = make(name, prediction_type=prediction_type, rescale_betas_zero_snr=prediction_type != "epsilon")
    for n in (1, 2, 10, 61):
        result = sample(scheduler, start(4, 3, 8, 8), nonlinear, n, generator=seeded(0))
        assert bool(result.isfinite().all())
        assert result.std() > 0.01


@every_sampler
def test_a_run_leaves_nothing_behind(name):
    """Neither a finished nor an interrupted one, of another length or shape, shows in the next, wherever it begins."""
    used = make(name)
    for before, interrupt, n in ((20, 3, 7), (7, 7, 20), (5, 2, 5), (1, 1, 3), (9, 4, 1)):
        for begin in {0, min(interrupt, n - 1)}:
            used.set_timesteps(before)
            x = start(1, 5)
            for t in used.timesteps[:interrupt]:
                x = used.step(nonlinear(x, 1), t, x, generator=seeded(0)).prev_sample
            fresh = make(name)
            for s in (used, fresh):
                s.set_timesteps(n)
            results = [run(s, start(), nonlinear, begin, generator=seeded(1)) for s in (used, fresh)]
            assert torch.equal(*results)
            again = run(used, start(), nonlinear, begin, generator=seeded(1))  # without set_timesteps in between
            assert torch.equal(again, results[0])


@every_sampler
def test_a_run_from_the_middle_is_the_run_over_the_timesteps_from_there(name):
    whole, part = make(name), make(name)
    whole.set_timesteps(12)
    if name == "inverse":
        part = copy.deepcopy(whole)  # it takes no increasing `timesteps`, see below
        part._set_steps(whole.timesteps[5:].tolist(), None)
    else:
        part.set_timesteps(timesteps=whole.timesteps[5:].tolist())
    whole.set_begin_index(5)
    results = (
        run(whole, start(), nonlinear, 5, generator=seeded(1)),
        run(part, start(), nonlinear, generator=seeded(1)),
    )
    assert torch.equal(*results)


@every_sampler
def test_editing_the_predicted_x_0_changes_no_later_step(name):
    scheduler, x = make(name), start()
    wanted = sample(make(name), x, nonlinear, 6, generator=seeded(1))
    scheduler.set_timesteps(6)
    generator = seeded(1)
    for t in scheduler.timesteps:
        result = scheduler.step(nonlinear(x, t.item()), t, x, generator=generator)
        x = result.prev_sample
        result.pred_original_sample.zero_()
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@every_sampler
def test_a_copy_goes_on_from_the_middle_by_itself(name, copied):
    scheduler = make(name)
    scheduler.set_timesteps(8)
    x = start()
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(nonlinear(x, 1), t, x, generator=seeded(1)).prev_sample
    other = copied(scheduler)
    results = [run(s, x, nonlinear, 4, generator=seeded(1)) for s in (scheduler, other)]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in MEMORY])
def test_steps_may_be_taken_in_any_order_and_twice(name):
    scheduler = make(name)
    scheduler.set_timesteps(10)
    x, v, w = torch.randn(3, 3)
    once = [scheduler.step(v, t, x, variance_noise=w).prev_sample for t in scheduler.timesteps]
    again = [scheduler.step(v, t, x, variance_noise=w).prev_sample for t in scheduler.timesteps.flip(0)]
    assert all(map(torch.equal, once, reversed(again)))


@pytest.mark.parametrize("name", MEMORY)
def test_a_step_that_does_not_follow_begins_anew(name):
    scheduler, fresh = make(name), make(name)
    for s in (scheduler, fresh):
        s.set_timesteps(10)
    x, v = torch.randn(2, 3, generator=seeded(1))
    for t in scheduler.timesteps[:4]:
        scheduler.step(-v, t, x, generator=seeded(1))
    for place in (6, 6, 2, 0):
        t = scheduler.timesteps[place]
        results = [s.step(v, t, x, generator=seeded(1)).prev_sample for s in (scheduler, copy.deepcopy(fresh))]
        assert torch.equal(*results)


def test_own_timesteps():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    scheduler.set_timesteps(timesteps=[999, 700, 20])
    assert scheduler.timesteps.tolist() == [999, 700, 20]
    assert scheduler.num_inference_steps == 3
    x = run(scheduler, torch.tensor([2.0, 0.0], dtype=torch.float64), oracle(1000))
    torch.testing.assert_close(x, torch.tensor([POINT, MEAN], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [[999, 990], [999, 998, 997], [999, 500, 499, 498, 2, 0], [400, 20], [1, 0], [0]])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "inverse"])
def test_own_timesteps_however_uneven_reach_the_point(name, own):
    scheduler, x = make(name), start(5, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=own)
    result, bound, calls = run_to_the_point(scheduler, x, *levels(), generator=seeded(1))
    assert calls == len(own)
    assert (result - POINT).abs().max().item() <= bound < 1e-9


def test_own_timesteps_of_inversion_increase():
    scheduler = make("inverse")
    scheduler.set_timesteps(timesteps=[20, 700, 999])
    alphas, sigmas = levels()
    noise, bound, _ = run_to_the_point(scheduler, torch.tensor([POINT], dtype=torch.float64), alphas, sigmas)
    assert abs(noise.item() - (1 - alphas[20]) * POINT / sigmas[20]) <= bound


# -- all data one point, which every right sampler reaches at every step count


@pytest.mark.full
@every_sampler
def test_point_mass_in_float32(name):
    assert not [*misses(name, torch.float32, sorted({*range(1, 41), *range(65, 1001, 187), *NOTORIOUS}))]


@pytest.mark.full
@thirds(("name", "dtype"), SAMPLERS, HALF)
def test_point_mass_in_half_precision(name, dtype):
    assert not [*misses(name, dtype, [*range(1, 33), *NOTORIOUS[:3], 1000])]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@every_sampler
def test_point_mass_at_every_number_of_steps(name, dtype):
    assert not [*misses(name, dtype, range(1, 1001))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim", "lcm", "inverse"])  # the three ways to choose timesteps
def test_n_timesteps_for_every_n(name):
    scheduler = make(name)
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        assert are_right(scheduler.timesteps.tolist(), n, name == "inverse"), n
        assert scheduler.num_inference_steps == n


@pytest.mark.full
@settings(max_examples=300, deadline=None)
@given(runs())
def test_point_mass_for_any_schedule_options_timesteps_and_beginning(drawn):
    """Image-to-image begins in the middle, with the point noised to the level there."""
    scheduler, count, begin, (alphas, sigmas), extra = drawn
    scheduler.set_begin_index(begin)
    noise = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64)
    start = scheduler.add_noise(torch.full_like(noise, POINT), noise, scheduler.timesteps[begin : begin + 1])
    result, bound, calls = run_to_the_point(scheduler, start, alphas, sigmas, begin, generator=seeded(0), **extra)
    assert calls == count - begin
    assert (result - POINT).abs().max().item() <= bound < 1e-9

import functools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr_diffusers.core import (
    TIMESTEP_SPACINGS,
    alpha_bar_table,
    check_timesteps,
    enforce_zero_terminal_snr,
    spaced_timesteps,
    subdivided_timesteps,
)


@functools.cache
def table(T):
    return enforce_zero_terminal_snr(alpha_bar_table("scaled_linear", T, 0.00085, 0.012))


@pytest.mark.parametrize(
    ("spacing", "one_based"),
    [
        ("leading", [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]),
        ("linspace", [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
        ("trailing", [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
    ],
)
def test_table_2_of_the_paper(spacing, one_based):
    assert [t + 1 for t in reversed(spaced_timesteps(spacing, 10, table(1000)))] == one_based


@pytest.mark.parametrize("T", [100, 1000, 1024])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_every_number_of_steps_is_met_and_decreases(spacing, T):
    for n in range(1, T + 1):
        steps = spaced_timesteps(spacing, n, table(T))
        assert len(steps) == n
        assert steps == check_timesteps(steps, T)
        if spacing != "leading":
            assert steps[0] == T - 1


@pytest.mark.parametrize("T", [100, 1000, 1024])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_equal_to_stock_wherever_stock_returns_n_steps(spacing, T):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    ratio = {"trailing": lambda n: (T, n), "leading": lambda n: (T // n, 1), "linspace": lambda n: (T - 1, n - 1)}
    wrong_length = 0
    for n in range(2, T + 1):
        stock.set_timesteps(n)
        theirs, ours = stock.timesteps.tolist(), spaced_timesteps(spacing, n, table(T))
        wrong_length += len(theirs) != n
        if len(theirs) == n:
            whole, denominator = ratio[spacing](n)
            first = n if spacing == "trailing" else n - 1
            for k, a, b in zip(range(first, -1, -1), ours, theirs, strict=False):
                # Where the exact value is a half, stock's floating-point sum may land on either side of it.
                assert a == b or (2 * whole * k % (2 * denominator) == denominator and abs(a - b) == 1)
    assert wrong_length == {("trailing", 100): 5, ("trailing", 1000): 62, ("trailing", 1024): 67}.get((spacing, T), 0)


@settings(deadline=None)
@given(st.integers(2, 4000), st.data(), st.sampled_from(TIMESTEP_SPACINGS))
def test_any_model_and_any_number_of_steps(T, data, spacing):
    n = data.draw(st.integers(1, T))
    steps = spaced_timesteps(spacing, n, table(T))
    assert len(steps) == n
    assert steps == check_timesteps(steps, T)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(n):
    with pytest.raises(ValueError, match=f"num_inference_steps={n} .* 1 to 1000"):
        spaced_timesteps("trailing", n, table(1000))


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="'karras' is unknown; choose one of trailing"):
        spaced_timesteps("karras", 10, table(1000))


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "one or more integers"),
        ([3.5], "integers"),
        ([1000, 5], r"\[1000\] lie outside \[0, 999\]"),
        ([5, -1], r"\[-1\] lie outside"),
        ([999, 500, 500], "500 follows 500"),
        ([1, 2], "2 follows 1"),
    ],
)
def test_own_timesteps_are_checked(timesteps, message):
    with pytest.raises(ValueError, match=message):
        check_timesteps(timesteps, 1000)


def test_own_timesteps_of_inversion_increase():
    assert check_timesteps([1, 2, 9], 10, increasing=True) == [1, 2, 9]
    with pytest.raises(ValueError, match="timesteps must increase strictly; 1 follows 2"):
        check_timesteps([2, 1], 10, increasing=True)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_places_are_rounded_to_the_nearest_timestep_and_ties_to_even_as_numpy_does(T, n):
    """In exact arithmetic, where numpy rounds a quotient that is rounded itself."""
    n = min(n, T)
    trailing = [round(Fraction(T * k, n)) - 1 for k in range(n, 0, -1)]
    assert spaced_timesteps("trailing", n, table(1000)[:1].expand(T)) == trailing
    if n > 1:
        linspace = [round(Fraction((T - 1) * k, n - 1)) for k in range(n - 1, -1, -1)]
        assert spaced_timesteps("linspace", n, table(1000)[:1].expand(T)) == linspace


def test_ties_are_met():
    assert spaced_timesteps("trailing", 4, table(1000)[:1].expand(10)) == [9, 7, 4, 1]  # 10, 7.5, 5, 2.5
    assert spaced_timesteps("linspace", 3, table(1000)[:1].expand(8)) == [7, 4, 0]  # 3.5


@pytest.mark.parametrize(("steps", "substeps"), [(1, 1), (4, 1), (4, 4), (4, 250), (3, 333), (20, 50), (1, 1000)])
def test_subdivided_steps_stay_between_their_own_timesteps(steps, substeps):
    timesteps = spaced_timesteps("trailing", steps, table(1000))
    found = subdivided_timesteps(timesteps, substeps, table(1000))
    assert [row[0] for row in found] == timesteps
    assert [len(row) for row in found] == [substeps] * steps
    joined = [timestep for row in found for timestep in row]
    assert joined == check_timesteps(joined, 1000)


def test_subdivided_steps_are_even_in_position():
    """The same places as those of kappa spacing, over the whole range in one segment."""
    assert subdivided_timesteps([999], 12, table(1000)) == [spaced_timesteps("kappa", 12, table(1000))]


def test_too_many_substeps_are_refused():
    with pytest.raises(ValueError, match="251 steps do not fit between timesteps 999 and 749"):
        subdivided_timesteps([999, 749, 499, 249], 251, table(1000))

import itertools

import numpy as np
import pytest
from arms import ARMS, GUIDED, MAIN_STEPS, RESCALE, UNGUIDED, Cell
from effects import FIXES, INTERACTIONS, Interval, contrast, difference, main_effect, together
from judge import Row
from report import effects_table, interactions_table
from scipy import stats

V, ZERO, LAST, RESCALED = -3.0, -2.0, -1.0, -0.5


def rows(value, seeds=(0, 1, 2)):
    """A row for every recipe; `value(arm, start, phi, seed)` is its Fréchet distance, and its W1."""
    found = {}
    for arm, start, phi, seed in itertools.product(ARMS, ("leading", "trailing"), (0.0, RESCALE), seeds):
        figure = value(arm.name, start, phi, seed)
        row = Row(300, figure, 0.0, 0.0, 0.0, 0.0, figure, 0.0, 0.0, 0.0)
        found[arm.name, Cell(start, MAIN_STEPS, GUIDED, phi), seed] = row
    return found


def additive(arm, start, phi, seed):
    return 10 + seed + V * (arm != "epsilon") + ZERO * (arm == "v-zero-snr") + LAST * (start == "trailing") + _r(phi)


def _r(phi):
    return RESCALED if phi else 0.0


def test_effects_that_add_up_are_found_in_every_context_and_do_not_interact():
    found = rows(additive)
    for fix, effect in zip(FIXES, (V, ZERO, LAST, RESCALED), strict=True):
        for terms in (fix.alone and difference(fix.alone), fix.last and difference(fix.last), main_effect(fix)):
            if terms:
                interval = contrast(found, terms, "frechet_distance")
                assert interval.mean == pytest.approx(effect)
                assert interval.half_width == pytest.approx(0, abs=1e-9)
    assert contrast(found, together(), "w1").mean == pytest.approx(V + ZERO + LAST + RESCALED)
    for terms in INTERACTIONS.values():
        assert contrast(found, terms, "frechet_distance").mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "both"),
    [
        ("v x last timestep", lambda arm, start, phi: arm != "epsilon" and start == "trailing"),
        ("zero SNR x last timestep", lambda arm, start, phi: arm == "v-zero-snr" and start == "trailing"),
        ("v x rescale", lambda arm, start, phi: arm != "epsilon" and phi > 0),
        ("zero SNR x rescale", lambda arm, start, phi: arm == "v-zero-snr" and phi > 0),
        ("last timestep x rescale", lambda arm, start, phi: start == "trailing" and phi > 0),
    ],
)
def test_what_two_fixes_give_only_together_is_their_interaction(name, both):
    found = rows(lambda arm, start, phi, seed: additive(arm, start, phi, seed) + 0.7 * both(arm, start, phi))
    for other, terms in INTERACTIONS.items():
        interaction = contrast(found, terms, "frechet_distance").mean
        assert interaction == pytest.approx(0.7 if other == name else 0, abs=1e-9)


def test_the_refused_corner_has_no_effect():
    v, zero_snr, *others = FIXES
    assert (v.last, zero_snr.alone) == (None, None)
    assert all(fix.alone and fix.last for fix in others)
    assert [len(fix.pairs) for fix in FIXES] == [4, 4, 6, 6]
    table = effects_table(rows(additive), GUIDED)
    assert "| zero terminal SNR (given v) | refused | **-2.00 ± 0.00** |" in table
    assert "| all together |  |  | **-6.50 ± 0.00** |" in table
    assert "| v x rescale |" in interactions_table(rows(additive))


def test_intervals_are_student_s_over_paired_seeds():
    noise = {0: 0.1, 1: -0.3, 2: 0.4}
    found = rows(lambda arm, start, phi, seed: 5 * seed + (noise[seed] if start == "trailing" else 0))
    interval = contrast(found, difference(FIXES[2].alone), "w1")
    expected = stats.t.interval(0.95, 2, np.mean([*noise.values()]), stats.sem([*noise.values()]))
    assert (interval.mean - interval.half_width, interval.mean + interval.half_width) == pytest.approx(expected)
    assert not interval.is_clear
    assert Interval.of([1.0, 1.1, 0.9]).is_clear
    alone = Interval.of([2.0])
    assert (alone.half_width, alone.is_clear) == (None, False)


def test_a_seed_counts_where_all_that_is_compared_is_there():
    found = rows(additive)
    del found["v-zero-snr", Cell("trailing", MAIN_STEPS, GUIDED, RESCALE), 1]
    assert contrast(found, together(), "w1").seeds == 2
    assert contrast(found, difference(FIXES[0].alone), "w1").seeds == 3
    assert contrast({}, together(), "w1") is None
    assert effects_table({}, GUIDED) == interactions_table({}) == ""


def test_without_guidance_there_is_none_to_rescale():
    found = {}
    for (arm, cell, seed), row in rows(additive).items():
        if cell.guidance_rescale == 0:
            found[arm, Cell(cell.sampler, cell.steps, UNGUIDED), seed] = row
    for fix, effect in zip(FIXES, (V, ZERO, LAST, 0.0), strict=True):
        for terms in (fix.last and difference(fix.last), main_effect(fix)):
            if terms:
                assert contrast(found, terms, "w1", UNGUIDED).mean == pytest.approx(effect, abs=1e-9)
    assert contrast(found, together(), "w1", UNGUIDED).mean == pytest.approx(V + ZERO + LAST)
    table = effects_table(found, UNGUIDED)
    assert "no guidance, 3 seeds" in table
    assert "guidance rescale" not in table

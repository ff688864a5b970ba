"""Products of parameters, of which a part is run by habit."""

import itertools

import pytest


def thirds(names, *axes, **options):
    """`pytest.mark.parametrize` over a product; a third of it has every value of each axis, the others are slow.

    With three axes of three values or more, that third also has every pair. Options are pytest's.
    """
    cases = [
        pytest.param(*values, marks=() if sum(places) % 3 == 0 else pytest.mark.slow)
        for places, values in (tuple(zip(*case, strict=True)) for case in itertools.product(*map(enumerate, axes)))
    ]
    return pytest.mark.parametrize(names, cases, **options)

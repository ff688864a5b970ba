import pytest
import torch
from small_pipelines import PIPELINES
from third_parties import PIPELINE_WARNINGS

from zsnr_diffusers.guidance.layout import find_denoisers

pytestmark = PIPELINE_WARNINGS


@pytest.mark.parametrize("name", sorted(PIPELINES)[::9])
def test_small_seeded_and_without_a_trace(name):
    before = torch.random.get_rng_state()
    first, second = PIPELINES[name].build(), PIPELINES[name].build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert find_denoisers(first)
    for one, other in zip(find_denoisers(first), find_denoisers(second), strict=True):
        assert not one.training
        assert sum(p.numel() for p in one.parameters()) < 1_000_000
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert PIPELINES[name].arguments() is not PIPELINES[name].arguments()

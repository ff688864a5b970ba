import diffusers
import pytest


@pytest.fixture
def schedule():
    """The schedule of the benchmarks, which silence diffusers for it."""
    from samplers import zero_snr_schedule

    before = diffusers.utils.logging.get_verbosity()
    yield zero_snr_schedule()
    diffusers.utils.logging.set_verbosity(before)

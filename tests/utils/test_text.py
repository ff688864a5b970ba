"""Text formatting for messages."""

import pytest

from zsnr_diffusers.utils.text import abbreviate


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")]
)
def test_the_first_and_the_number_of_the_others(count, text):
    assert abbreviate(range(count), 3) == text

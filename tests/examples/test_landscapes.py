import datasets
import numpy as np
import pytest
from landscapes import BRIGHTEST, caption, landscape, make_landscapes, read_landscapes

from zsnr_diffusers.evaluation import mean_luminance


@pytest.mark.parametrize("brightness", [-0.95, -0.5, 0.0, 0.3, 0.95])
def test_a_landscape_is_as_bright_as_asked(brightness):
    image = landscape(brightness, np.random.default_rng(0))
    assert mean_luminance([image])[0] == pytest.approx(brightness, abs=0.01)  # grey levels are 1 / 127.5 apart


def test_landscapes_are_deterministic_even_and_captioned_by_their_brightness(tmp_path):
    first, second = (make_landscapes(tmp_path / name, 60, 16, seed=3) for name in "ab")
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()
    rows = datasets.load_dataset("imagefolder", data_dir=str(first), split="train")
    luminance = mean_luminance(rows["image"])
    even = np.linspace(-BRIGHTEST, BRIGHTEST, 60)
    assert np.abs(np.sort(luminance) - even).max() < 0.05
    agree = [caption(value) == text for value, text in zip(luminance, rows["text"], strict=True)]
    assert np.mean(agree) > 0.9  # rounding to grey levels moves those at a border
    assert read_landscapes(first).shape == (60, 3, 16, 16)

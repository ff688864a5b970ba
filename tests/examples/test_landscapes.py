import json

import datasets
import numpy as np
import pytest
from landscapes import BRIGHTEST, SEASONS, caption, captions, landscape, make_landscapes, read_landscapes

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


@pytest.mark.parametrize("season", SEASONS)
def test_a_season_has_its_ground_and_keeps_the_brightness(season):
    image = landscape(0.2, np.random.default_rng(0), season=season)
    assert mean_luminance([image])[0] == pytest.approx(0.2, abs=0.01)
    red, green, blue = np.asarray(image)[-8:].mean(axis=(0, 1))
    assert {"summer": green > max(red, blue), "autumn": red > green > blue, "winter": blue > red}[season]


def test_captions_of_a_season_end_as_asked(tmp_path):
    make_landscapes(tmp_path, 6, 16, season="winter", ending=" in winter")
    texts = [json.loads(line)["text"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(texts) == sorted(captions(" in winter"))
    assert captions(" in winter")[0] == "a black landscape in winter"

import json
import operator

import datasets
import numpy as np
import pytest
from landscapes import (
    BRIGHTEST,
    BRIGHTNESS_WORDS,
    LIGHTS,
    SEASONS,
    SIDES,
    Details,
    all_details,
    caption,
    captions,
    detailed_captions,
    landscape,
    make_landscapes,
    read_landscapes,
)

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


def test_detailed_captions_say_what_is_seen(tmp_path):
    folder = make_landscapes(tmp_path, 144, 16, seed=3, detailed=True)
    texts = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({text.split(" ", 2)[2] for text in texts}) == len(all_details()) == 36
    assert {len(text.split()) for text in texts} == {14}  # CLIP's own two tokens make it 16
    pixels = read_landscapes(folder)
    words = [
        dict(
            zip(
                ("brightness", "season", "light", "side", "sky"),
                operator.itemgetter(1, 2, 5, 9, 12)(text.split()),
                strict=True,
            )
        )
        for text in texts
    ]
    warm = (pixels[:, 0] - pixels[:, 2]).mean(dim=(1, 2))
    right = pixels[:, :, :, 8:].mean(dim=(1, 2, 3)) - pixels[:, :, :, :8].mean(dim=(1, 2, 3))
    means = {
        (kind, word): values[[one[kind] == word for one in words]].mean()
        for kind, values, some in (("light", warm, LIGHTS), ("side", right, SIDES))
        for word in some
    }
    assert means["light", "warm"] > means["light", "clear"] + 0.1 > means["light", "cold"] + 0.2
    assert means["side", "right"] > 0.1 > -0.1 > means["side", "left"]
    assert words[0]["brightness"] in BRIGHTNESS_WORDS


def test_details_keep_the_brightness_and_move_the_hills():
    def ground(sky):
        """Rows that are nearer to the lowest ones in color than to the highest."""
        images = [landscape(0.2, np.random.default_rng(seed), details=Details(sky=sky)) for seed in range(8)]
        assert mean_luminance(images) == pytest.approx([0.2] * 8, abs=0.01)
        rows = np.stack([np.asarray(image).mean(axis=1) for image in images])
        above, below = (np.linalg.norm(rows - rows[:, [edge]], axis=2) for edge in (0, -1))
        return (below < above).mean()

    assert ground("wide") < ground("") - 0.02
    assert ground("") < ground("narrow") - 0.02


def test_without_details_a_landscape_is_as_before():
    assert landscape(0.2, np.random.default_rng(0), details=Details()) == landscape(0.2, np.random.default_rng(0))


def test_every_combination_of_details_has_a_caption_for_each_brightness():
    found = detailed_captions()
    assert len(found) == len(set(found)) == len(BRIGHTNESS_WORDS) * len(all_details())
    words = [caption.split()[1] for caption in found]
    assert list(dict.fromkeys(words)) == list(BRIGHTNESS_WORDS)
    assert all(words.count(word) == len(all_details()) for word in BRIGHTNESS_WORDS)

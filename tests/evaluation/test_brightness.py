import json

import numpy as np
import pytest
from landscapes import BRIGHTEST, BRIGHTNESS_WORDS, captions
from PIL import Image

from zsnr_diffusers.evaluation import PromptSuite, brightness_score, clipped_share, load_suite

SUITE = PromptSuite("three", ("dark", "middle", "bright"), (-0.8, 0.0, 0.8))


def score(luminance, prompts=SUITE.prompts, clipped=None, suite=SUITE):
    return brightness_score(suite, prompts, luminance, np.zeros(len(prompts)) if clipped is None else clipped)


@pytest.fixture(scope="module")
def ours():
    return load_suite("brightness")


def test_our_suite_asks_for_all_of_the_range(ours):
    assert len(ours.prompts) == len(set(ours.prompts)) == 64
    counts = np.histogram(ours.luminance, [-1, -0.6, -0.2, 0.2, 0.6, 1])[0]
    assert counts.min() >= 3
    assert abs(np.mean(ours.luminance)) < 0.2
    assert (min(ours.luminance), max(ours.luminance)) == (-1, 1)


def test_solid_colors_ask_for_their_luminance(ours):
    asked = dict(zip(ours.prompts, ours.luminance, strict=True))
    for color, rgb in {"black": (0, 0, 0), "white": (255,) * 3, "red": (255, 0, 0), "yellow": (255, 255, 0)}.items():
        luma = np.dot(rgb, (0.2126, 0.7152, 0.0722)) / 127.5 - 1
        assert asked[f"a solid {color} background"] == pytest.approx(luma, abs=0.006)


def test_the_suite_of_landscapes_is_that_of_their_captions():
    from pathlib import Path

    import landscapes

    suite = load_suite(Path(landscapes.__file__).with_name("landscapes.jsonl"))
    assert list(suite.prompts) == captions()
    width = 2 * BRIGHTEST / len(BRIGHTNESS_WORDS)
    np.testing.assert_allclose(suite.luminance, [-BRIGHTEST + width * (i + 0.5) for i in range(6)], atol=1e-4)


def test_a_perfect_model_and_one_that_ignores_the_prompt(ours):
    perfect = score(ours.luminance, ours.prompts, suite=ours)
    assert (perfect.adherence, perfect.range_covered, perfect.error, perfect.clipped) == (1, 1, 0, 0)
    grey = score(np.zeros(64), ours.prompts, suite=ours)
    assert (grey.adherence, grey.range_covered) == (0, 0)
    assert grey.error == pytest.approx(np.abs(ours.luminance).mean())
    assert score(-np.array(ours.luminance), ours.prompts, suite=ours).adherence == -1


def test_a_range_that_is_too_narrow_is_all_that_is_wrong(ours):
    narrow = score(0.4 * np.array(ours.luminance), ours.prompts, suite=ours)
    assert narrow.adherence == 1
    assert narrow.range_covered == pytest.approx(0.4, abs=0.01)
    assert score(0.5 + 0.01 * np.array(ours.luminance), ours.prompts, suite=ours).range_covered < 0.02


def test_adherence_counts_pairs_of_prompts_that_are_apart():
    near = PromptSuite("near", ("a", "b", "c"), (-0.5, -0.4, 0.5))
    # a and b are 0.1 apart and may be in any order; of the two other pairs one is reversed, or level.
    assert score([0.3, -0.3, 0.0], near.prompts, suite=near).adherence == 0
    assert score([0.0, -0.3, 0.0], near.prompts, suite=near).adherence == 0.5
    assert score([0.3, -0.3, 0.4], near.prompts, suite=near).adherence == 1
    several = score([-0.5, 0.1, 0.0, 0.5, 0.2], ("dark", "dark", "middle", "bright", "bright"))
    assert several.adherence == pytest.approx((7 - 1) / 8)
    assert several.images == 5


def test_the_error_is_of_means_over_the_images_of_a_prompt():
    assert score([-0.9, -0.7, 0.3, 0.8], ("dark", "dark", "middle", "bright")).error == pytest.approx(0.1)


def test_clipping_counts_where_neither_black_nor_white_is_asked_for():
    suite = PromptSuite("ends", ("black", "grey"), (-1.0, 0.0))
    assert score([-1, 0], suite.prompts, [0.9, 0.2], suite).clipped == pytest.approx(0.2)
    only = PromptSuite("only ends", ("black", "white"), (-1.0, 1.0))
    assert score([-1, 1], only.prompts, [0.9, 0.9], only).clipped == 0


def test_clipped_share_counts_values_of_channels():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    pixels[0, 0] = (0, 255, 7)
    assert clipped_share(Image.fromarray(pixels)) == pytest.approx(2 / 12)
    assert clipped_share(Image.new("L", (3, 3), 255)) == 1
    assert clipped_share(Image.new("L", (3, 3), 254)) == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("dark", "middle", "grey"), "the prompt 'grey' is not in it"),
        (("dark", "middle", "middle"), "the prompt 'bright' has no image"),
        (("dark",) * 2, "got 2 for 3"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        brightness_score(SUITE, prompts, np.zeros(3), np.zeros(3))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (['{"text": "a", "luminance": 0.5}', "[1]"], "line 2: expected"),
        (['{"luminance": 0.5}'], "line 1: expected"),
        (['{"text": "a", "luminance": 2}'], "-1 .black. to 1 .white., got 2"),
        (['{"text": "a", "luminance": true}'], "got True"),
        (['{"text": "a", "luminance": 1}'] * 2, "'a' comes 2 times"),
        (['{"text": "a", "luminance": 0.5}', '{"text": "b", "luminance": 0.6}'], "differ by 0.25 or more"),
        ([], "differ by 0.25 or more"),
    ],
)
def test_bad_files_are_refused(tmp_path, lines, message):
    file = tmp_path / "suite.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_suite(file)


def test_what_is_neither_a_name_nor_a_file_is_refused():
    with pytest.raises(FileNotFoundError, match="'brighness' is neither a file nor one of brightness"):
        load_suite("brighness")


def test_a_file_may_have_more_keys_and_empty_lines(tmp_path):
    rows = [{"text": "a", "luminance": -1, "group": "x"}, {"text": "ü", "luminance": 0.5}]
    (tmp_path / "s.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    suite = load_suite(tmp_path / "s.jsonl")
    assert (suite.prompts, suite.luminance) == (("a", "ü"), (-1.0, 0.5))

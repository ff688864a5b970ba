import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from zsnr_diffusers.evaluation import LuminanceSummary, luminance_coverage, mean_luminance, prompt_share
from zsnr_diffusers.utils.images import ImageError

UNIT = st.floats(-1, 1, allow_nan=False)


# Mean luminance


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 0, 0), -1),
        ((255, 255, 255), 1),
        ((255, 0, 0), 2 * 0.2126 - 1),
        ((0, 255, 0), 2 * 0.7152 - 1),
        ((0, 0, 255), 2 * 0.0722 - 1),
    ],
)
def test_primaries_in_every_form(tmp_path, colour, expected):
    image = Image.new("RGB", (4, 3), colour)
    image.save(tmp_path / "a.png")
    array = np.broadcast_to(np.array(colour).reshape(1, 3, 1, 1) / 127.5 - 1, (1, 3, 3, 4)).astype(np.float32)
    forms = [[image], [tmp_path / "a.png"], [str(tmp_path / "a.png")], array]
    forms += [torch.from_numpy(array.copy()).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for form in forms:
        assert mean_luminance(form) == pytest.approx([expected], abs=1e-6)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_files_and_tensors_agree(array):
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].double() / 127.5 - 1
    assert mean_luminance([Image.fromarray(array)]) == pytest.approx(mean_luminance(tensor), abs=1e-12)


def test_grey_keeps_its_value_in_every_mode():
    for mode in ("L", "RGB", "RGBA", "LA"):
        image = Image.new("L", (2, 2), 51).convert(mode)
        assert mean_luminance([image]) == pytest.approx([-0.6])


def test_images_are_read_one_at_a_time_from_a_generator():
    values = mean_luminance(Image.new("L", (1, 1), 255 * (i % 2)) for i in range(4))
    assert values == pytest.approx([-1, 1, -1, 1])
    assert values.dtype == np.float64


def test_nothing_gives_nothing():
    assert mean_luminance([]).shape == (0,)
    assert mean_luminance(np.zeros((0, 3, 8, 8), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 2, 2), np.uint8), "dtype uint8"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.int16), "dtype int16"),
        (np.zeros((1, 2, 2, 3)), r"\[1, 2, 2, 3\]"),
        (np.zeros((3, 2, 2)), r"\[3, 2, 2\]"),
        (np.full((1, 3, 2, 2), 200.0), "-1, 1.*200"),
        (np.full((1, 3, 2, 2), np.nan), "nan"),
        ([np.zeros((2, 2, 3))], "ndarray"),
    ],
)
def test_other_layouts_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        mean_luminance(images)


def test_broken_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.png"):
        mean_luminance([tmp_path / "a.png"])


# Coverage


def test_distance_of_point_masses_is_their_difference():
    coverage = luminance_coverage(np.full(7, 0.25), np.full(3, -0.5))
    assert coverage.w1 == pytest.approx(0.75)
    assert coverage.floor == coverage.floor_p95 == 0  # any sample of a point mass is the point mass


@given(hnp.arrays(np.float64, st.integers(1, 20), elements=UNIT), UNIT)
def test_distance_to_a_shifted_copy_is_the_shift(values, shift):
    assert luminance_coverage(values + shift, values, num_bootstraps=1).w1 == pytest.approx(abs(shift), abs=1e-12)


def test_distance_of_two_uniform_distributions():
    # Around one centre with half widths a and b: W1 = |a - b| / 2, the mean of |a - b| |2 u - 1|.
    grid = (np.arange(2000) + 0.5) / 1000 - 1
    assert luminance_coverage(0.4 * grid, grid, num_bootstraps=1).w1 == pytest.approx(0.3, abs=1e-6)


def test_summary_of_an_even_grid():
    summary = LuminanceSummary.of(np.linspace(-1, 1, 101))
    assert asdict(summary) == pytest.approx(
        {"n": 101, "mean": 0, "std": np.sqrt(102 / 300), "p5": -0.9, "p50": 0, "p95": 0.9, "min": -1, "max": 1}
    )  # variance of k evenly spaced points over width 2: (k + 1) / (3 (k - 1))


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(0, 0.3, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "two modes": lambda rng, n: rng.choice([-0.8, 0.8], n) + rng.normal(0, 0.05, n),
}


@pytest.mark.full
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), [(64, 256), (256, 64), (200, 200)])
def test_floor_is_what_a_perfect_generator_shows(name, n, m):
    rng, draw = np.random.default_rng(0), DISTRIBUTIONS[name]
    results = [luminance_coverage(draw(rng, n), draw(rng, m), seed=i, num_bootstraps=60) for i in range(100)]
    distances = np.array([result.w1 for result in results])
    floor = np.mean([result.floor for result in results])
    # The standard error of a mean of 100 distances is 4 to 7 %; the documented bias is a few %.
    error = np.hypot(2.5 * distances.std() / 10, 0.04 * distances.mean())
    assert floor == pytest.approx(distances.mean(), abs=error)
    exceeded = np.mean([result.w1 > result.floor_p95 for result in results])
    assert exceeded <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100) + 0.02  # binomial error and the bias


def test_floor_does_not_see_the_generated_values():
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, 50)
    perfect, collapsed = luminance_coverage(rng.uniform(-1, 1, 50), real), luminance_coverage(np.zeros(50), real)
    assert perfect.floor == collapsed.floor
    assert collapsed.w1 > collapsed.floor_p95 > collapsed.floor
    assert collapsed.w1 == pytest.approx(np.abs(real).mean())


def test_seed_decides_the_floor():
    real = np.random.default_rng(0).uniform(-1, 1, 50)
    assert luminance_coverage(real, real, seed=1) == luminance_coverage(real, real, seed=1)
    assert luminance_coverage(real, real, seed=1).floor != luminance_coverage(real, real, seed=2).floor


def test_result_is_plain_data_and_prints_its_numbers():
    coverage = luminance_coverage([0.0, 0.5], [0.25, 0.25, 0.25])
    assert json.loads(json.dumps(asdict(coverage))) == asdict(coverage)
    assert "Wasserstein-1 0.2500" in str(coverage)
    generated, real = str(coverage).splitlines()[1:3]
    assert generated.split()[:3] == ["generated", "2", "0.2500"]
    assert real.split() == ["real", "3", "0.2500", "0.0000", *["0.2500"] * 5]


@pytest.mark.parametrize("bad", [[], [[0.0]], [0.0, np.nan]])
def test_bad_values_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="generated"):
        luminance_coverage(bad, [0.0])
    with pytest.raises(ValueError, match="real"):
        luminance_coverage([0.0], bad)


# Prompt share


def test_prompt_decides_all():
    assert prompt_share([0.1, 0.1, 0.7, 0.7], ["dark", "dark", "light", "light"]) == pytest.approx(1)


def test_prompt_decides_nothing():
    assert prompt_share([0.1, 0.7, 0.1, 0.7], ["a", "a", "b", "b"]) == pytest.approx(0, abs=1e-15)


def test_share_of_constructed_groups():
    # Group means -1 and 1 with within-group deviations +-0.5: between 4 * 1, within 4 * 0.25.
    assert prompt_share([-1.5, -0.5, 0.5, 1.5], [3, 3, 8, 8]) == pytest.approx(4 / 5)


def test_share_of_unequal_groups():
    # Mean 0.25; between 1 * 0.75^2 + 3 * 0.25^2 = 0.75 is all there is.
    assert prompt_share([1, 0, 0, 0], ["a", "b", "b", "b"]) == pytest.approx(1)
    # Mean 0.5; groups {1} and {1, 0, 0}: 0.25 + 3 / 36 of 1.
    assert prompt_share([1, 1, 0, 0], ["a", "b", "b", "b"]) == pytest.approx(1 / 3)


@given(st.lists(st.tuples(UNIT, st.integers(0, 3)), min_size=1, max_size=30))
def test_share_is_a_share(pairs):
    values, groups = zip(*pairs, strict=True)
    assert 0 <= prompt_share(values, groups) <= 1


def test_share_of_pure_noise_has_the_documented_bias():
    rng, groups = np.random.default_rng(0), [i % 5 for i in range(40)]
    shares = [prompt_share(rng.normal(size=40), groups) for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(4 / 39, abs=4 * np.std(shares) / np.sqrt(2000))


def test_constant_luminance_has_no_share():
    assert prompt_share([0.1] * 3, ["a", "b", "c"]) == 0


def test_labels_must_match():
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        prompt_share([0.0, 0.0, 0.0], ["a", "b"])


def test_floor_of_a_fixed_number_of_images_per_prompt_is_what_a_perfect_generator_shows():
    """Four prompts that divide the range between them: chance decides within a quarter only."""
    rng = np.random.default_rng(0)

    def images(per_prompt):
        prompts = np.repeat(range(4), per_prompt)
        return (prompts + rng.random(len(prompts))) / 2 - 1, prompts.tolist()

    real, real_prompts = images(100)
    made = [images(10) for _ in range(100)]
    shown = [luminance_coverage(values, real, num_bootstraps=1).w1 for values, _ in made]
    coverage = luminance_coverage(made[0][0], real, groups=(made[0][1], real_prompts))
    assert coverage.floor == pytest.approx(np.mean(shown), rel=0.1)
    assert coverage.floor < 0.6 * luminance_coverage(made[0][0], real).floor
    one = luminance_coverage(made[0][0], real, groups=(["all"] * 40, ["all"] * 400))
    assert one == luminance_coverage(made[0][0], real)


def test_prompt_without_real_images_is_named():
    with pytest.raises(ValueError, match="no real image for 'snow'"):
        luminance_coverage([0.0], [0.0], groups=(["snow"], ["cat"]))


def test_a_folder_a_path_and_one_image(tmp_path):
    for name, grey in (("b.png", 255), ("a.png", 0)):
        Image.new("L", (4, 4), grey).save(tmp_path / name)
    assert mean_luminance(str(tmp_path)).tolist() == pytest.approx([-1, 1])
    assert mean_luminance(tmp_path / "b.png").tolist() == pytest.approx([1])
    assert mean_luminance(Image.new("L", (4, 4), 0)).tolist() == pytest.approx([-1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        mean_luminance(tmp_path / "empty")
    with pytest.raises(ImageError, match="cannot read image no-such-folder: the file does not exist"):
        mean_luminance("no-such-folder")


def test_a_summary_reads_as_a_table():
    text = str(LuminanceSummary.of([-1e-9, 0.0]))
    assert text.splitlines()[1].split() == ["2", *["0.0000"] * 7]

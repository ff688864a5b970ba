import sys

import numpy as np
import pytest
from PIL import Image, ImageChops

from zsnr_diffusers.core import alpha_bar_table, enforce_zero_terminal_snr
from zsnr_diffusers.evaluation import (
    BitsPerDim,
    luminance_coverage,
    plot_bits_per_dim,
    plot_luminance,
    plot_luminance_over_steps,
    plot_schedule,
    sample_grid,
)

RNG = np.random.default_rng(0)


def draw(path, **arguments):
    plot_luminance(path, **arguments)
    with Image.open(path) as image:
        return image.convert("RGB")


def test_picture_grows_with_its_rows(tmp_path):
    one = draw(tmp_path / "a.png", generated={"stock": RNG.normal(size=9) / 9})
    three = draw(tmp_path / "b.png", generated={name: RNG.normal(size=9) / 9 for name in "abc"})
    assert one.width == three.width
    assert three.height > 1.5 * one.height


def has_blue(image, left, right):
    """Whether the part between two fractions of the width shows the colour of the generated images."""
    part = image.crop((int(left * image.width), 0, int(right * image.width), image.height))
    pixels = np.asarray(part).astype(int)
    return bool((pixels[..., 2] - pixels[..., 0] > 60).any())


def test_dark_is_left_and_white_is_right(tmp_path):
    dark = draw(tmp_path / "dark.png", generated={"": np.full(50, -0.9)})
    assert has_blue(dark, 0, 0.2)
    assert not has_blue(dark, 0.2, 0.7)  # the legend stands at the right


def test_real_images_change_the_picture(tmp_path):
    values = RNG.uniform(-1, 0, 50)
    alone = draw(tmp_path / "a.png", generated={"x": values})
    beside = draw(tmp_path / "b.png", generated={"x": values}, real=RNG.uniform(0, 1, 80))
    assert ImageChops.difference(alone, beside).getbbox() is not None


@pytest.mark.full
def test_path_is_returned_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "plot.pdf"
    assert plot_luminance(str(path), {"x": [0.0]}) == path
    assert path.read_bytes().startswith(b"%PDF")


def test_pyplot_is_not_touched(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    plot_luminance(tmp_path / "a.png", {"x": [0.0]})
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("generated", [{}, {"x": []}])
def test_nothing_to_draw(tmp_path, generated):
    with pytest.raises(ValueError, match="at least one"):
        plot_luminance(tmp_path / "a.png", generated)


def test_luminance_over_steps_rises_with_what_is_painted(tmp_path):
    def blue_rows(*shifts):
        real = RNG.uniform(-0.9, 0.9, 50)
        coverages = {step: luminance_coverage(real / 9 + shift, real) for step, shift in enumerate(shifts)}
        with Image.open(plot_luminance_over_steps(tmp_path / "a.png", coverages)) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)[:400, :, :]  # the upper part
        left, right = np.array_split(pixels[:, 150:600], 2, axis=1)
        return [float(np.nonzero((half[..., 2] - half[..., 0] > 60).any(axis=1))[0].mean()) for half in (left, right)]

    dark_to_bright = blue_rows(-0.7, 0.5)
    assert dark_to_bright[0] > dark_to_bright[1] + 50
    flat = blue_rows(0.0, 0.0)
    assert flat[0] == pytest.approx(flat[1], abs=5)  # a line's edge may fall on either row of pixels
    with pytest.raises(ValueError, match="at least one step"):
        plot_luminance_over_steps(tmp_path / "b.png", {})


def bits(terms):
    return BitsPerDim(float(np.nansum(terms)), 0.1, 0.0, np.array(terms), 5, "fixed_small")


def draw_bits(path, **results):
    plot_bits_per_dim(path, results)
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.full
def test_terms_by_timestep(tmp_path):
    terms = 2.0 / np.arange(1, 101)
    alone = draw_bits(tmp_path / "a.png", v=bits(terms))
    beside = draw_bits(tmp_path / "b.png", v=bits(terms), x=bits(terms[::-1]))
    assert ImageChops.difference(alone, beside).getbbox() is not None
    # where terms fall the line is above at the left, where the decoder is
    falls, rises = (draw_bits(tmp_path / "c.png", **{"": bits(part)}) for part in (terms, terms[::-1]))
    assert [begins_above(image) for image in (falls, rises)] == [True, False]


def begins_above(image):
    """Whether a line is seen in the upper left, right of the axis."""
    part = image.crop((100, 100, 250, image.height // 2))
    return has_blue(part, 0, 1)


def test_terms_that_nobody_visited_and_zeros_are_left_out(tmp_path):
    terms = np.where(np.arange(100) % 3 == 2, np.nan, 2.0 / np.arange(1, 101))
    terms[60:] = 0.0
    assert begins_above(draw_bits(tmp_path / "a.png", **{"": bits(terms)}))


def test_no_bits_to_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plot_bits_per_dim(tmp_path / "a.png", {})


def solid(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def test_grid_is_exact():
    grid = sample_grid([[solid("red"), solid("lime")], [solid("blue")]], gap=2)
    assert grid.size == (22, 22)
    expected = solid("white", (22, 22))
    for corner, colour in (((2, 2), "red"), ((12, 2), "lime"), ((2, 12), "blue")):
        expected.paste(colour, (*corner, corner[0] + 8, corner[1] + 8))
    assert np.array_equal(grid, expected)


def test_smaller_images_are_fitted_into_the_cell_and_keep_their_shape():
    grid = sample_grid([[solid("red", (16, 8))]], cell=8, gap=0)
    assert grid.size == (8, 8)
    colours = [grid.getpixel((4, y)) for y in (0, 3, 4, 7)]
    assert colours == [(255, 255, 255), (255, 0, 0), (255, 0, 0), (255, 255, 255)]


def test_labels_stand_left_of_their_row_and_do_not_touch_the_images(tmp_path):
    long = "a very long prompt about nothing that has to be wrapped, Größe 日本"
    rows = [[solid("red", (120, 120))]] * 2
    plain = sample_grid(rows, ["", ""])
    labelled = sample_grid(rows, ["", long], tmp_path / "new" / "grid.png")
    left, top, right, bottom = ImageChops.difference(plain, labelled).getbbox()
    assert left >= 0
    assert right <= labelled.width - 128
    assert (top, bottom) >= (124, 124)
    with Image.open(tmp_path / "new" / "grid.png") as saved:
        assert np.array_equal(saved, labelled)


def test_headings_stand_above_their_column_on_one_line_and_move_the_images_down():
    rows = [[solid("red", (40, 40)), solid("lime", (40, 40))]] * 2
    plain, empty = sample_grid(rows), sample_grid(rows, column_labels=["", ""])
    headed = sample_grid(rows, column_labels=["", "t = 0"])
    above = empty.height - plain.height
    assert np.array_equal(empty.crop((0, above, *empty.size)), plain)
    left, top, _, bottom = ImageChops.difference(empty, headed).getbbox()
    assert left >= 46  # a letter may begin a pixel early
    assert (top, bottom) <= (above, above + 4)


def test_wrong_grids():
    with pytest.raises(ValueError, match="at least one image"):
        sample_grid([[], []])
    with pytest.raises(ValueError, match="1 for 2 rows"):
        sample_grid([[solid("red")]] * 2, ["a"])
    with pytest.raises(ValueError, match="1 for 2 columns"):
        sample_grid([[solid("red")], [solid("red")] * 2], column_labels=["a"])


def draw_schedule(path, table, visited):
    with Image.open(plot_schedule(path, table, visited)) as image:
        return image.convert("RGB")


@pytest.mark.full
def test_zero_snr_is_drawn_on_a_line_of_its_own(tmp_path):
    """Red and dashed, below all that is not zero; and where there is no zero, there is no such line."""
    table = alpha_bar_table("scaled_linear", 100, 0.00085, 0.012)
    red_rows = {}
    for name, drawn in (("signal", table), ("zero", enforce_zero_terminal_snr(table))):
        pixels = np.asarray(draw_schedule(tmp_path / f"{name}.png", drawn, {})).astype(int)
        red = (pixels[..., 0] - pixels[..., 2] > 100) & (pixels[..., 0] - pixels[..., 1] > 100)
        red_rows[name] = np.flatnonzero(red[:, :300].any(axis=1))  # left of the legend
    assert red_rows["signal"].size == 0
    assert red_rows["zero"].size
    assert red_rows["zero"].min() > 0.8 * len(pixels)


def test_visited_steps_are_marked(tmp_path):
    table = alpha_bar_table("scaled_linear", 100, 0.00085, 0.012)
    bare, marked, extra = (
        draw_schedule(tmp_path / f"{i}.png", table, visited)
        for i, visited in enumerate(({}, {2: [99, 49]}, {2: [99, -1]}))
    )
    assert has_blue(marked, 0.4, 0.6)
    assert not has_blue(bare, 0, 1)
    assert not has_blue(extra, 0.4, 0.6)
    assert has_blue(extra, 0, 0.2)  # -1 is no timestep, and is marked at the end of the curve

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.transforms import compute_crop, resize_and_crop

SIDES = st.integers(1, 300)
SIZES = st.tuples(SIDES, SIDES)


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@given(SIZES, SIZES, st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)))
@example((1, 300), (300, 1), None)
def test_a_crop_lies_within_the_least_image_that_covers_it(original, size, place):
    crop = compute_crop(original, size, place)
    assert crop.size == size
    (height, width), (rows, columns) = crop.scaled, size
    assert 0 <= crop.top <= height - rows
    assert 0 <= crop.left <= width - columns
    assert rows == height or columns == width
    for here, there in zip(original, crop.scaled, strict=True):  # both sides by one factor, to a pixel
        scale = max(size[0] / original[0], size[1] / original[1])
        assert abs(there - here * scale) <= 1


@pytest.mark.parametrize("original", [(40, 60), (60, 40), (24, 32), (9, 11), (100, 10)])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 32)])
def test_pixels_are_those_that_pillow_cuts(original, size):
    image = picture(original)
    for place in (None, (0.0, 0.0), (0.3, 0.999)):
        crop = compute_crop(original, size, place)
        whole = np.asarray(image.resize(crop.scaled[::-1], Image.Resampling.LANCZOS))
        expected = whole[crop.top : crop.top + size[0], crop.left : crop.left + size[1]]
        assert np.array_equal(resize_and_crop(image, crop).permute(1, 2, 0).numpy(), expected)
        mirrored = np.asarray(ImageOps.mirror(Image.fromarray(whole)))
        left = crop.hflip().left
        assert np.array_equal(
            mirrored[crop.top : crop.top + size[0], left : left + size[1]], np.flip(expected, axis=1)
        )


def test_an_image_of_the_size_is_left_as_it_is():
    image = picture((24, 16))
    assert np.array_equal(
        resize_and_crop(image, compute_crop((24, 16), (24, 16))).permute(1, 2, 0).numpy(), np.asarray(image)
    )


def test_the_centre_is_in_the_middle_to_half_a_pixel():
    for original in ((40, 61), (61, 40), (33, 90)):
        crop = compute_crop(original, (16, 16))
        for start, length in zip((crop.top, crop.left), crop.scaled, strict=True):
            assert abs(start + 8 - length / 2) <= 0.5


def test_random_crops_are_uniform_over_all_places():
    """16 rows of 20: five places, 2000 draws; 4 standard deviations."""
    places = [torch.rand(2, generator=make_generator(0, position)).tolist() for position in range(2000)]
    tops = torch.tensor([compute_crop((20, 16), (16, 16), place).top for place in places])
    counts = torch.bincount(tops, minlength=5)
    assert counts.shape == (5,)
    assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert {compute_crop((20, 16), (16, 16), place).left for place in places} == {0}

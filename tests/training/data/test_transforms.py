import io

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.transforms import compute_crop, resize_and_crop
from zsnr_diffusers.utils.images import ImageError, load_rgb

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


# -- JPEGs, decoded no larger than they need be


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def of_all_pixels(data, crop):
    """The crop by Lanczos of the whole image."""
    whole = load_rgb(data).resize(crop.scaled[::-1], Image.Resampling.LANCZOS)
    box = (crop.left, crop.top, crop.left + crop.size[1], crop.top + crop.size[0])
    return np.asarray(whole.crop(box)).astype(int)


@pytest.mark.parametrize("side", [32, 64, 100, 256])
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("name", ["china", "flower"])
def test_photographs_keep_their_pixels_to_a_half_of_a_level_in_the_mean(name, scale, side):
    """Two photographs, 640 x 427, an odd height: of 255 levels 0.6 in the mean, 3 for 99 %, never more than 12."""
    photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
    data = jpeg(photo.resize((scale * photo.width, scale * photo.height), Image.Resampling.LANCZOS))
    crop = compute_crop((scale * photo.height, scale * photo.width), (side, side))
    decoded = load_rgb(data, at_least=crop.decoded)
    off = np.abs(resize_and_crop(decoded, crop).permute(1, 2, 0).numpy() - of_all_pixels(data, crop))
    assert off.mean() < 0.6
    assert np.percentile(off, 99) <= 3
    assert off.max() <= 12
    assert (decoded.width < scale * photo.width) == (crop.decoded[1] <= scale * photo.width / 2)


@given(st.integers(40, 400), st.integers(40, 400), st.integers(8, 40), st.sampled_from([None, (0.0, 0.0), (0.9, 0.9)]))
@example(127, 255, 8, (0.9, 0.9))
def test_what_is_decoded_smaller_does_not_move(height, width, side, place):
    """A slope over the whole image is where it was to half of the largest pixels that are decoded, 4 of the image's.

    One more level for rounding. Without the fraction of the last pixel the far end would be off by up to 7.
    """
    y, x = np.mgrid[:height, :width]
    slope = 255 * (x / width + y / height) / 2
    data = jpeg(Image.fromarray(np.repeat(slope.astype(np.uint8)[..., None], 3, axis=2)))
    crop = compute_crop((height, width), (side, side), place)
    pixels = resize_and_crop(load_rgb(data, at_least=crop.decoded), crop).permute(1, 2, 0).numpy()
    assert np.abs(pixels - of_all_pixels(data, crop)).max() <= 4 * 127.5 * (1 / width + 1 / height) + 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_are_decoded_whole(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture((202, 303)), exif=exif)
    size = load_rgb(data).size
    assert load_rgb(data, at_least=(20, 20)).size == ((38, 26) if orientation == 1 else size)


def test_damage_and_other_formats_are_not_missed():
    data = jpeg(picture((256, 256)))
    assert load_rgb(data, at_least=(200, 100)).size == (256, 256)
    with pytest.raises(ImageError):
        load_rgb(data[: len(data) // 2], at_least=(16, 16))
    buffer = io.BytesIO()
    picture((256, 256)).save(buffer, "PNG")
    assert load_rgb(buffer.getvalue(), at_least=(16, 16)).size == (256, 256)

import contextlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zsnr_diffusers.utils import images
from zsnr_diffusers.utils.images import ImageError, find_images, load_rgb, oriented_size

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def corner_picture(mode="RGB"):
    """3 wide, 2 high, black, with red at the top left and blue at the top right."""
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((0, 0), RED)
    picture.putpixel((2, 0), BLUE)
    return picture.convert(mode)


def test_rgb_file_is_unchanged(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert np.array_equal(load_rgb(source), array)


def test_rgb_image_in_memory_is_returned_itself():
    picture = corner_picture()
    assert load_rgb(picture) is picture


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]  # exactly the 256 values of 8 bit
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    loaded = np.asarray(load_rgb(tmp_path / f"ramp.{suffix}"))
    assert np.array_equal(loaded, np.repeat(np.arange(256)[None, :, None], 3, axis=2))


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=30))
def test_16_bit_grey_is_rounded_to_the_nearest_8_bit_value(values):
    image = Image.fromarray(np.array([values], dtype=np.uint16))
    grey = np.asarray(load_rgb(image))[0, :, 0].astype(int)
    assert np.abs(np.array(values) - 257 * grey).max() <= 128


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.int32)])  # modes "I;16" and "I"
def test_dark_deep_grey_file_stays_dark(tmp_path, name, dtype):
    Image.fromarray(np.full((2, 2), 200, dtype=dtype)).save(tmp_path / name)
    assert np.asarray(load_rgb(tmp_path / name)).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 51, 255]], np.int32), [0, 51, 255]),
        (np.array([[0, 257 * 51, 65535]], np.int32), [0, 51, 255]),
        (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 51.0, 255.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 257.0 * 51, 65535.0]], np.float32), [0, 51, 255]),
    ],
)
def test_deep_grey_in_memory_takes_the_range_that_holds_it(values, expected):
    assert np.asarray(load_rgb(Image.fromarray(values)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e6])
def test_values_that_are_no_brightness_are_refused(value):
    with pytest.raises(ImageError, match="pixel values"):
        load_rgb(Image.fromarray(np.array([[0.5, value]], np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(tmp_path, mode):
    # 0 alpha hides the colour, 255 shows it, 51 of 255 mixes a fifth of black into white.
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        image.putpixel((x, 0), (0, 0, 0, alpha) if mode == "RGBA" else (0, alpha))
    image.save(tmp_path / "a.png")
    assert pixels(load_rgb(tmp_path / "a.png")) == [[[255] * 3, [0] * 3, [204] * 3]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_becomes_white(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=0)
    assert pixels(load_rgb(tmp_path / f"a.{suffix}")) == [[[255] * 3, list(BLUE)]]


def test_transparent_colour_becomes_white(tmp_path):
    corner_picture().save(tmp_path / "a.png", transparency=RED)
    assert pixels(load_rgb(tmp_path / "a.png"))[0] == [[255] * 3, [0] * 3, list(BLUE)]


def test_transparent_16_bit_grey_becomes_white(tmp_path):
    Image.fromarray(np.array([[300, 257 * 9]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.info["transparency"] == 300
    assert pixels(load_rgb(tmp_path / "a.png")) == [[[255] * 3, [9] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_keep_black_and_white(mode):
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    assert pixels(load_rgb(image.convert(mode))) == [[[0] * 3, [255] * 3]]


def test_cmyk_file(tmp_path):
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixels(load_rgb(tmp_path / "a.tif")) == [[list(RED)]]


def stored_with_orientation(upright, orientation):
    """The image as a camera would store it: the inverse of what turns it upright."""
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    return upright if inverse is None else upright.transpose(Image.Transpose(inverse))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, suffix, orientation):
    upright = corner_picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored_with_orientation(upright, orientation).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    assert oriented_size(path) == oriented_size(path.read_bytes()) == (upright.height, upright.width)
    loaded = load_rgb(path)
    assert pixels(loaded) == pixels(upright)
    assert pixels(load_rgb(loaded)) == pixels(upright)
    with Image.open(path) as lazy:
        assert pixels(load_rgb(lazy)) == pixels(upright)


def test_orientation_of_a_16_bit_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert pixels(load_rgb(tmp_path / "a.png")) == [[[0] * 3], [[255] * 3]]


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    corner_picture().save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels(load_rgb(tmp_path / "a.png")) == pixels(corner_picture())


def test_first_frame_of_an_animation(tmp_path):
    Image.new("RGB", (1, 1), RED).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (1, 1), BLUE)]
    )
    assert pixels(load_rgb(tmp_path / "a.gif")) == [[list(RED)]]


def encoded(kind="png"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not an image"),
        (encoded("jpeg")[:-300], "truncated"),
        (encoded("png")[:500], "truncated"),
        (encoded("webp")[:500], "could not create decoder"),
    ],
)
def test_broken_files_are_named(tmp_path, content, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        load_rgb(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="row 7"):
        load_rgb(content, name="row 7")


@given(st.binary(max_size=200), st.integers(0, 2**32), st.sampled_from(["png", "jpeg", "webp", "gif", "tiff"]))
def test_damage_anywhere_is_an_image_error_or_a_picture(damage, position, kind):
    content = bytearray(encoded(kind))
    start = position % len(content)
    content[start : start + len(damage)] = damage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow reports some of the damage that it survives
        with contextlib.suppress(ImageError):
            assert load_rgb(bytes(content)).mode == "RGB"


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"cannot read image .*nowhere\.png: the file does not exist"):
        oriented_size(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"gone\.png: the file does not exist"):
        load_rgb(tmp_path / "gone.png")


def test_large_picture_is_not_refused_and_pillows_limit_is_restored(tmp_path, monkeypatch):
    corner_picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # 6 pixels: above twice that, Pillow refuses
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    assert pixels(load_rgb(tmp_path / "a.png")) == pixels(corner_picture())
    assert Image.MAX_IMAGE_PIXELS == 2


def test_picture_above_our_limit_is_refused_from_its_header():
    header = struct.pack(">2I5B", 40_000, 20_000, 8, 2, 0, 0, 0)  # 800 Mpx in 57 bytes
    content = encoded()[:8] + struct.pack(">I", 13) + b"IHDR" + header
    content += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(ImageError, match=r"40000x20000 is 800 Mpx, above the limit of 537 Mpx.*MAX_PIXELS"):
        load_rgb(content)


def test_limit_is_a_setting(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 5)
    with pytest.raises(ImageError, match="3x2"):
        load_rgb(corner_picture())


def test_find_images_sorts_and_leaves_out_what_is_none(tmp_path):
    for name in ("b.PNG", "a/z.jpeg", "a/y.txt", ".hidden.png", ".cache/x.png", "c.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)] == ["a/z.jpeg", "b.PNG", "c.tiff"]


def test_find_images_in_a_hidden_folder_that_is_named(tmp_path):
    folder = tmp_path / ".photos"
    folder.mkdir()
    (folder / "a.png").touch()
    assert find_images(folder) == [folder / "a.png"]


def test_find_images_wants_a_folder(tmp_path):
    assert find_images(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "a.png").touch()
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        find_images(tmp_path / "a.png")


def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in (folder / "a.png", elsewhere / "b.png"):
        path.parent.mkdir()
        path.touch()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "c.png").symlink_to(tmp_path / "nowhere")
    (folder / "d.png").symlink_to(folder / "d.png")
    os.mkfifo(folder / "e.png")
    found = [str(path.relative_to(folder)) for path in find_images(folder)]
    assert found == ["a.png", "c.png", "d.png", "linked/b.png"]
    with pytest.raises(ImageError, match="does not exist"):
        load_rgb(folder / "c.png")
    with pytest.raises(ImageError, match=r"d\.png"):
        load_rgb(folder / "d.png")

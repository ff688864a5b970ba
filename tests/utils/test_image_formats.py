"""Formats that need a package, and the first image of what holds several."""

import importlib
import math
import sys

import numpy as np
import pytest
from PIL import Image

from zsnr_diffusers.utils import image_formats
from zsnr_diffusers.utils.image_formats import IMAGE_SUFFIXES, OPTIONAL_FORMATS, missing_package, missing_packages
from zsnr_diffusers.utils.images import ImageError, find_images, load_rgb, oriented_size

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40
HEIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafheic" + b"\0" * 40
JXL = b"\xff\x0a" + b"\0" * 40
JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40


@pytest.fixture
def without_plugins(monkeypatch):
    """Pillow as it is where no plugin is installed, and no AVIF is built in."""
    suffixes = {suffix for one in OPTIONAL_FORMATS for suffix in one.suffixes}
    left = {suffix: name for suffix, name in Image.registered_extensions().items() if suffix not in suffixes}
    monkeypatch.setattr(Image, "EXTENSION", left)
    monkeypatch.setattr(image_formats, "import_module", importlib.import_module)
    for one in OPTIONAL_FORMATS:
        monkeypatch.setitem(sys.modules, one.module, None)  # importing it is an ImportError
    image_formats.register_plugins.cache_clear()
    yield
    image_formats.register_plugins.cache_clear()


@pytest.mark.parametrize("content", [HEIC, HEIF, JXL, JXL_BOX], ids=["heic", "mif1", "jxl", "jxl in boxes"])
@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
@pytest.mark.usefixtures("without_plugins")
def test_what_lacks_a_package_is_named_with_it_whatever_the_file_is_called(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    package = "pillow-heif" if content in (HEIC, HEIF) else "pillow-jxl-plugin"
    for source in (tmp_path / name, content):
        with pytest.raises(ImageError, match=rf"cannot read image .*: (HEIC|JPEG XL) needs `pip install {package}`"):
            load_rgb(source)


@pytest.mark.usefixtures("without_plugins")
def test_missing_packages_are_counted_by_format(tmp_path):
    for name in ("a.heic", "b.HEIF", "c.jxl", "d.png", "e.avif", ".f.heic"):
        (tmp_path / name).touch()
    assert missing_packages(find_images(tmp_path)) == [
        "2 images in HEIC (.heic, .heif) need `pip install pillow-heif`",
        "1 image in JPEG XL (.jxl) needs `pip install pillow-jxl-plugin`",
        "1 image in AVIF (.avif) needs `pip install pillow-avif-plugin`",
    ]


def test_what_pillow_reads_itself_needs_no_package_and_no_plugin_takes_it_over(monkeypatch, without_plugins):
    imported = []
    monkeypatch.setattr(image_formats, "import_module", lambda name: imported.append(name) or math)
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION, ".heic": "HEIF", ".avif": "AVIF"})
    image_formats.register_plugins()
    assert imported == ["pillow_jxl"]
    assert missing_package(b"\0\0\0\x1cftypavif\0\0\0\0" + b"\0" * 20) is None
    assert missing_package(HEIC) is missing_package(HEIF) is missing_package(b"\x89PNG\r\n\x1a\n") is None
    assert missing_package(JXL) is not None


def test_plugins_are_registered(monkeypatch, without_plugins):
    """A package that registers itself when it is imported, and one that is asked to."""

    class Plugin:
        @staticmethod
        def register_heif_opener():
            Image.EXTENSION[".heic"] = "HEIF"

    def import_module(name):
        if name == "pillow_jxl":
            Image.EXTENSION[".jxl"] = "JXL"
        if name == "pillow_avif":
            raise ImportError(name)
        return Plugin

    monkeypatch.setattr(image_formats, "import_module", import_module)
    image_formats.register_plugins()
    assert [one.is_readable for one in OPTIONAL_FORMATS] == [True, True, False]


FRAMES = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]


@pytest.mark.parametrize("suffix", ["bmp", "dib", "gif", "jfif", "jpe", "jpg", "png", "tga", "tif", "tiff", "webp"])
@pytest.mark.parametrize("upper", [False, True])
def test_formats_that_pillow_writes_are_found_and_read(tmp_path, suffix, upper):
    path = tmp_path / f"a.{suffix.upper() if upper else suffix}"
    FRAMES[0].save(path)
    assert find_images(tmp_path) == [path]
    # lossy formats come within a few grey levels of an even color
    assert np.abs(np.asarray(load_rgb(path)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "png", "apng", "tif", "webp", "avif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip("not in this Pillow")
    path = tmp_path / f"a.{suffix}"
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
    with Image.open(path) as stored:
        assert stored.n_frames == 2
    assert np.abs(np.asarray(load_rgb(path)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(("module", "suffix"), [("pillow_heif", "heic"), ("pillow_jxl", "jxl")])
def test_plugins_themselves(tmp_path, module, suffix):
    pytest.importorskip(module)
    image_formats.register_plugins()
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    wide.save(path, exif=exif.tobytes())
    shown = np.asarray(load_rgb(path)).astype(int)
    assert shown.shape == (64, 32, 3)  # upright, once
    assert oriented_size(path) == (64, 32)
    # Lossy, over an even color by a few grey levels.
    assert np.abs(shown[:24].mean((0, 1)) - (255, 0, 0)).max() <= 5
    assert np.abs(shown[-24:].mean((0, 1)) - (0, 0, 255)).max() <= 5
    assert missing_packages([path]) == []


def test_every_suffix_is_in_lower_case_with_its_dot():
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)

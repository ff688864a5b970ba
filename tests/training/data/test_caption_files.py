"""Captions beside images."""

import pytest

from zsnr_diffusers.training.data.caption_files import (
    CaptionFileError,
    find_caption_files,
    parse_text_caption,
    read_captions,
)


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"", ""),
        (b"\n \r\n", ""),
        (b"a cat", "a cat"),
        (b" a cat \n", "a cat"),
        ("\ufeffsn\u00f6w \u2744\ufe0f".encode(), "sn\u00f6w \u2744\ufe0f"),
        (b"a cat\r\nsnow\r\n", ["a cat", "snow"]),
        (b"a cat\rsnow", ["a cat", "snow"]),
        (b"\n\na cat\n\n snow\n\n", ["a cat", "snow"]),
        ("one\u2028line".encode(), "one\u2028line"),  # which `splitlines` would divide
    ],
)
def test_each_line_is_a_caption(content, caption):
    assert parse_text_caption(content) == caption


@pytest.mark.parametrize(
    "content", [b"caf\xe9", "a cat".encode("utf-16"), "a cat".encode("utf-16-le")], ids=["Latin-1", "UTF-16", "no BOM"]
)
def test_another_encoding_is_refused(content):
    with pytest.raises(ValueError, match="save it as UTF-8"):
        parse_text_caption(content)


def test_caption_files_are_found_by_name_and_extension(tmp_path):
    images = [tmp_path / name for name in ("a.png", "b.jpg", "b.v2.jpg", "n/c.PNG", "none.png")]
    files = [tmp_path / name for name in ("a.txt", "b.TXT", "b.v2.txt", "n/c.txt", "none.caption", "n/none.txt")]
    found = find_caption_files(images, files, ".txt")
    assert {image.name: file.name for image, file in found.items()} == {
        "a.png": "a.txt",
        "b.jpg": "b.TXT",
        "b.v2.jpg": "b.v2.txt",
        "c.PNG": "c.txt",
    }
    assert list(find_caption_files(images, files, ".caption")) == [images[-1]]


def test_json_has_captions_in_a_field_and_errors_stand_in_their_place(tmp_path):
    contents = {
        "a": b'{"text": "one", "caption": ["two", "three"]}',
        "b": b'{"text": 5}',
        "c": b"[",
        "d": b'{"text": [1]}',
        "e": b"\xff",
        "f": b'["text"]',
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    files = {tmp_path / f"{name}.png": tmp_path / f"{name}.json" for name in (*contents, "gone")}
    captions = list(read_captions(files, "text").values())
    assert captions[0] == "one"
    assert read_captions(files, "caption")[tmp_path / "a.png"] == ["two", "three"]
    for name, caption in zip([*"bcdef", "gone"], captions[1:], strict=True):
        assert isinstance(caption, CaptionFileError)
        assert f"cannot read the caption {tmp_path / name}.json: " in str(caption)

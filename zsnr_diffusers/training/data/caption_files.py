"""Captions in files next to the images, 0001.png and 0001.txt: the layout of kohya, OneTrainer and SimpleTuner."""

import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OTHER_EXTENSIONS = (".txt", ".caption", ".json")
"""Common extensions of caption files, suggested in error messages if present."""


class CaptionFileError(ValueError):
    """A caption file that cannot be read; the message names it and the reason."""


def find_caption_files(images: Collection[Path], files: Collection[Path], extension: str) -> dict[Path, Path]:
    """The caption file of each image that has one.

    Args:
        images: of a folder.
        files: other files in the folder.
        extension: of captions, with its dot; not case-sensitive.
    """
    there = set(files)
    candidates = {image: [image.with_suffix(extension), image.with_suffix(extension.upper())] for image in images}
    return {image: path for image, paths in candidates.items() for path in paths[::-1] if path in there}


def read_captions(files: Mapping[Path, Path], field: str) -> dict[Path, Any]:
    """Read each image's caption file, as text or a list of texts; one that cannot be read is a `CaptionFileError`.

    Args:
        files: from `find_caption_files`.
        field: of the caption in files that are JSON.
    """

    def caption_or_error(path: Path) -> Any:
        try:
            content = path.read_bytes()
            return (
                _parse_json_caption(content, field) if path.suffix.lower() == ".json" else parse_text_caption(content)
            )
        except (OSError, ValueError) as error:
            return CaptionFileError(f"cannot read the caption {path}: {error}")

    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(caption_or_error, files.values()), strict=True))


def parse_text_caption(content: bytes) -> str | list[str]:
    """The caption in a text file; each line is a caption, and an empty file is the empty caption.

    Raises:
        ValueError: it is not UTF-8.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", _decode_utf8(content)) if line.strip()]
    return lines if len(lines) > 1 else "".join(lines)


def _parse_json_caption(content: bytes, field: str) -> Any:
    """The caption, or list of captions, in a field of a JSON file."""
    values = json.loads(_decode_utf8(content))
    caption = values.get(field) if isinstance(values, dict) else None
    if not isinstance(caption, str | list) or not all(isinstance(text, str) for text in caption):
        raise ValueError(f"no text or list of texts in the field {field!r}")
    return caption


def _decode_utf8(content: bytes) -> str:
    """Decode a caption file, refusing other encodings with a message."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:  # appears next to every ASCII letter in UTF-16
        raise ValueError("it is UTF-16 or not text; save it as UTF-8")
    return text

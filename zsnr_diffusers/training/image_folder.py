"""The rows of a folder of images: with captions from metadata or from files beside them, or with classes by folder.

Folders are read here and not by `datasets`, which reads splits into the names of files and folders and leaves out, in
silence, what it does not take for training data. What is left out here is counted, and some of it named.
"""

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from ..image_formats import IMAGE_SUFFIXES, missing_packages
from ..images import find_files, is_image
from .caption_files import OTHER_EXTENSIONS, CaptionFileError, caption_files, read_captions
from .config import RunConfig
from .metadata import (
    METADATA_FILES,
    Record,
    as_lists_if_any,
    caption_values,
    column_names,
    path_column,
    plain_values,
    read_metadata,
    relative_path,
)
from .notices import notify, report_bad, some_of

_TRAIN = ("train", "training")
_SPLITS = (*_TRAIN, "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Names of folders, in lower case, that are splits in `datasets`."""

_CONTAINERS = (".zip", ".tar", ".gz", ".7z", ".rar", ".parquet", ".arrow")


@dataclass(frozen=True)
class ImageFolder:
    """What lies in a folder and is trained on.

    Attributes:
        root: the folder.
        images: in it, in the order of their rows.
        files: others.
        parts: folders in it that are trained on.
    """

    root: Path
    images: list[Path]
    files: list[Path]
    parts: tuple[Path, ...]

    def names(self, paths: Sequence[Path]) -> str:
        """The first of some paths, and the number of the others."""
        return some_of([os.path.relpath(path, self.root) for path in paths])

    def holds(self, path: Path) -> bool:
        """Whether a path lies where images are trained on."""
        return any(part in path.parents for part in self.parts)

    @property
    def metadata(self) -> list[Path]:
        """Its metadata files.

        Raises:
            ValueError: two in one folder.
        """
        found = [path for path in self.files if path.name in METADATA_FILES]
        for one, other in itertools.pairwise(found):
            if one.parent == other.parent:
                raise ValueError(f"{one} and {other.name} describe the same images: remove one of the two.")
        return found


def read_folder(config: RunConfig, wanted: Sequence[str], needs_captions: bool) -> datasets.Dataset:
    """A row for each image of `--train_data_dir`, with its path; columns that are not wanted are empty.

    Without metadata, images in several folders at one depth have the column `label`, the names of their folders.

    Args:
        config: of the run.
        wanted: names of the columns that are needed.
        needs_captions: these are captions; they may lie beside the images.

    Raises:
        ValueError: no images, no captions, or files that cannot be read; with their names.
        OSError: no such folder.
    """
    folder = _training_part(_usable(_find(config), config))
    extension = getattr(config, "caption_extension", ".txt")
    if folder.metadata:
        columns = _described(folder, config, wanted, needs_captions)
        if needs_captions and (beside := caption_files(folder.images, folder.files, extension)):
            notify(f"captions come from {folder.names(folder.metadata)}; {len(beside)} {extension} files are not read")
    elif needs_captions:
        columns = _captioned(folder, config, wanted[0], extension)
    else:
        return _labelled(folder, config.image_column)
    return datasets.Dataset.from_dict(columns)


def _find(config: RunConfig) -> ImageFolder:
    # Absolute, since a worker may be elsewhere; links keep their names. Sorted as text, as `datasets` does: what a
    # seed gives depends on the order.
    root, own = Path(os.path.abspath(str(config.train_data_dir))), Path(os.path.abspath(config.output_dir))
    paths = sorted((path for path in find_files(root) if root not in own.parents or own not in path.parents), key=str)
    images = [path for path in paths if is_image(path)]
    folder = ImageFolder(root, images, [path for path in paths if not is_image(path)], (root,))
    containers = Counter(path.suffix.lower() for path in folder.files if path.name not in METADATA_FILES)
    packed = ", ".join(f"{containers[suffix]} {suffix}" for suffix in _CONTAINERS if containers[suffix])
    hidden = [
        path for path in folder.files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")
    ]
    if not images:
        remedy = f", but {packed}: unpack archives, or pass .tar as --train_shards and tables as --dataset_name"
        raise ValueError(f"--train_data_dir={config.train_data_dir} holds no images{remedy * bool(packed)}.")
    if packed:
        notify(f"{config.train_data_dir} also holds {packed}; they are not opened")
    if hidden:
        notify(f"{len(hidden)} hidden images are left out: {folder.names(hidden)}")
    return folder


def _usable(folder: ImageFolder, config: RunConfig) -> ImageFolder:
    """The folder without images whose names no table can hold; formats that nothing installed reads are named."""
    if config.on_bad_image == "fail" and (missing := missing_packages(folder.images)):
        raise ValueError(
            f"--train_data_dir={config.train_data_dir}: {'; '.join(missing)}, or leave them out with "
            "--on_bad_image skip."
        )
    unusable = [path for path in folder.images if re.search("[\ud800-\udfff]", str(path))]
    names = [os.fsencode(path).decode(errors="backslashreplace") for path in unusable]
    report_bad(names, f"{len(names)} of {len(folder.images)} images have names that are not UTF-8", config)
    return replace(folder, images=[path for path in folder.images if path not in unusable])


def _training_part(folder: ImageFolder) -> ImageFolder:
    """Of a folder of splits, the one to train on; any other folder as it is.

    It is one if all folders in it have the names of splits, for `bus`, `car`, `train` and `truck` are classes.
    """
    base = Path(os.path.commonpath([path.parent for path in folder.images]))
    counts = Counter("" if path.parent == base else path.relative_to(base).parts[0] for path in folder.images)
    splits = [name for name in counts if name.lower() in _SPLITS]
    parts = tuple(base / name for name in splits if name.lower() in _TRAIN)
    others = [f"{name}/" for name in counts if name and name not in splits]
    if not parts or len(splits) < 2:
        return folder
    if others:
        shown = " and ".join(f"{name}/" for name in splits)
        notify(f"all images are used, those of {shown} too: they are no splits, with {some_of(others)} beside them")
        return folder
    left_out = {name: count for name, count in counts.items() if base / name not in parts}
    shown = ", ".join(f"{count} of {name}/" if name else f"{count} beside it" for name, count in left_out.items())
    notify(f"images of {' and '.join(f'{part.name}/' for part in parts)} are used; left out are {shown}")
    closed = [base / name for name in left_out if name]
    part = replace(folder, parts=parts)
    return replace(
        part,
        images=[path for path in folder.images if part.holds(path)],
        files=[path for path in folder.files if not any(one in path.parents for one in closed)],
    )


def _described(
    folder: ImageFolder, config: RunConfig, wanted: Sequence[str], needs_captions: bool
) -> dict[str, list[Any]]:
    """The rows of the metadata, in their order."""
    # A name may be stored in another normal form than it is written in: macOS takes accents off their letters.
    known = {unicodedata.normalize("NFC", str(path)): path for path in folder.images}
    records: list[Record] = []
    paths: list[Path] = []
    names: dict[str, None] = {}
    for file in folder.metadata:
        found = read_metadata(file)
        column = path_column(found, config.image_column)
        names |= dict.fromkeys(name for name in column_names(found) if name not in (column, config.image_column))
        for record in found:
            path = file.parent / relative_path(record, column)
            if folder.holds(path):
                records.append(record)
                paths.append(known.get(unicodedata.normalize("NFC", str(path)), path))
    described = set(paths)
    left_out = [path for path in folder.images if path not in described]
    if left_out:
        notify(
            f"{len(left_out)} of {len(folder.images)} images have no row in {folder.names(folder.metadata)} and are "
            f"left out: {folder.names(left_out)}"
        )
    read = caption_values if needs_captions else plain_values
    columns = {name: read(records, name) if name in wanted else [None] * len(records) for name in names}
    for name in set(wanted) & set(columns) if needs_captions else ():
        if empty := columns[name].count(None):
            notify(f"{empty} rows of {folder.names(folder.metadata)} have no {name}: theirs is the empty caption")
    return {config.image_column: [str(path) for path in paths], **columns}


def _captioned(folder: ImageFolder, config: RunConfig, column: str, extension: str) -> dict[str, list[Any]]:
    """The images with a caption file."""
    found = caption_files(folder.images, folder.files, extension)
    if not found:
        raise ValueError(_no_captions(folder, config, extension))
    if left_out := [path for path in folder.images if path not in found]:
        notify(
            f"{len(left_out)} of {len(folder.images)} images have no {extension} file and are left out: "
            f"{folder.names(left_out)}"
        )
    captions = read_captions(found, column)
    bad = [str(caption) for caption in captions.values() if isinstance(caption, CaptionFileError)]
    report_bad(bad, f"{len(bad)} of {len(found)} captions cannot be read", config)
    whole = {path: caption for path, caption in captions.items() if not isinstance(caption, CaptionFileError)}
    if not whole:
        raise ValueError("No image is left to train on.")
    return {config.image_column: [str(path) for path in whole], column: as_lists_if_any([*whole.values()])}


def _no_captions(folder: ImageFolder, config: RunConfig, extension: str) -> str:
    first, text = folder.images[0].relative_to(folder.root), ""
    for other in OTHER_EXTENSIONS:
        if count := len(caption_files(folder.images, folder.files, other)):
            text = f" There are {count} {other} files beside them: pass --caption_extension {other}."
    return (
        f"--train_data_dir={config.train_data_dir} holds {len(folder.images)} images but no captions: add a "
        f'metadata.jsonl with one line per image, {{"file_name": "{first.as_posix()}", "text": "..."}}, or a '
        f"{extension} file beside each image, {first.with_suffix(extension).as_posix()}.{text}"
    )


def _labelled(folder: ImageFolder, image_column: str) -> datasets.Dataset:
    """All images, with the names of their folders where these are classes."""
    names = sorted({path.parent.name for path in folder.images})
    columns: dict[str, list[Any]] = {image_column: [str(path) for path in folder.images]}
    features = {image_column: datasets.Value("string")}
    if len(names) > 1 and len({len(path.parts) for path in folder.images}) == 1:
        columns["label"] = [path.parent.name for path in folder.images]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

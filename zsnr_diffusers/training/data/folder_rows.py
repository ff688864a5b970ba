"""The samples of an image folder: with captions from metadata or caption files, or with classes from subfolders."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import datasets

from ...utils.image_formats import missing_packages
from ..config import Captions, DataConfig
from .caption_files import OTHER_EXTENSIONS, CaptionFileError, find_caption_files, read_captions
from .image_folder import ImageFolder, open_image_folder
from .metadata import (
    Record,
    caption_values,
    class_values,
    column_names,
    find_path_column,
    read_metadata,
    relative_path,
    unify_captions,
)
from .notices import notify, report_unusable


def read_folder_rows(config: DataConfig) -> datasets.Dataset:
    """A row with its path for each image of `--train_data_dir`; metadata columns that are not needed are empty.

    Without metadata, captions are in files next to the images, and the column `label` contains the names of the
    images' folders.

    Raises:
        ValueError: no images, no captions, no classes, or files that cannot be read; with their names.
        OSError: no such folder.
    """
    folder, captions = open_image_folder(config), config.captions
    wanted = [column for option, column in config.columns.items() if option != "image_column"]
    if folder.metadata:
        rows = _rows_from_metadata(folder, config, wanted)
        if captions and (beside := find_caption_files(folder.images, folder.files, captions.extension)):
            files = f"{captions.extension} files are not read: {len(beside)}"
            notify(f"captions come from {folder.abbreviate(folder.metadata)}; {files}")
    elif captions:
        rows = _rows_from_caption_files(folder, config, captions)
    elif "label" in wanted:
        rows = _rows_from_class_folders(folder, config)
    else:
        rows = datasets.Dataset.from_dict({config.image_column: [str(path) for path in folder.images]})
    missing = missing_packages(rows.data.column(config.image_column).to_pylist())
    if missing and config.on_bad_image == "fail":
        raise ValueError(
            f"--train_data_dir={config.train_data_dir}: {'; '.join(missing)}, or skip them with --on_bad_image skip."
        )
    return rows


def _rows_from_metadata(folder: ImageFolder, config: DataConfig, wanted: Sequence[str]) -> datasets.Dataset:
    """Rows of an image folder's metadata files, in their order."""
    # A stored name may have another Unicode normal form than the written one: macOS decomposes accents.
    known = {unicodedata.normalize("NFC", str(path)): path for path in folder.images}
    records: list[Record] = []
    paths: list[Path] = []
    names: dict[str, None] = {}
    for file in folder.metadata:
        found = read_metadata(file)
        column = find_path_column(found, config.image_column)
        names |= dict.fromkeys(name for name in column_names(found) if name not in (column, config.image_column))
        for record in found:
            path = file.parent / relative_path(record, column)
            if folder.contains(path):
                records.append(record)
                paths.append(known.get(unicodedata.normalize("NFC", str(path)), path))
    described = set(paths)
    left_out = [path for path in folder.images if path not in described]
    if left_out:
        notify(
            f"{len(left_out)} of {len(folder.images)} images have no row in {folder.abbreviate(folder.metadata)} and "
            f"are skipped: {folder.abbreviate(left_out)}"
        )
    read = caption_values if config.captions else class_values
    columns = {name: read(records, name) if name in wanted else [None] * len(records) for name in names}
    for name in set(wanted) & set(columns) if config.captions else ():
        if empty := columns[name].count(None):
            notify(
                f"rows of {folder.abbreviate(folder.metadata)} without {name}, which get the empty caption: {empty}"
            )
    return datasets.Dataset.from_dict({config.image_column: [str(path) for path in paths], **columns})


def _rows_from_caption_files(folder: ImageFolder, config: DataConfig, captions: Captions) -> datasets.Dataset:
    """Rows of an image folder's images that have a caption file."""
    column, extension = captions
    found = find_caption_files(folder.images, folder.files, extension)
    if not found:
        raise ValueError(_no_captions_message(folder, str(config.train_data_dir), extension))
    if left_out := [path for path in folder.images if path not in found]:
        notify(
            f"{len(left_out)} of {len(folder.images)} images have no {extension} file and are skipped: "
            f"{folder.abbreviate(left_out)}"
        )
    read = read_captions(found, column)
    bad = [str(caption) for caption in read.values() if isinstance(caption, CaptionFileError)]
    report_unusable(bad, f"{len(bad)} of {len(found)} captions cannot be read", config)
    whole = {path: caption for path, caption in read.items() if not isinstance(caption, CaptionFileError)}
    if not whole:
        raise ValueError("There are no images left to train on.")
    return datasets.Dataset.from_dict(
        {config.image_column: [str(path) for path in whole], column: unify_captions([*whole.values()])}
    )


def _no_captions_message(folder: ImageFolder, name: str, extension: str) -> str:
    """Error message for an image folder without captions, with the remedy."""
    first, text = folder.images[0].relative_to(folder.root), ""
    for other in OTHER_EXTENSIONS:
        if count := len(find_caption_files(folder.images, folder.files, other)):
            text = f" There are {count} {other} files next to them: pass --caption_extension {other}."
    return (
        f"--train_data_dir={name} contains {len(folder.images)} images but no captions: add a "
        f'metadata.jsonl with one line per image, {{"file_name": "{first.as_posix()}", "text": "..."}}, or a '
        f"{extension} file next to each image, {first.with_suffix(extension).as_posix()}.{text}"
    )


def _rows_from_class_folders(folder: ImageFolder, config: DataConfig) -> datasets.Dataset:
    """Rows of all images of a folder, with the names of their folders as classes."""
    names = sorted({path.parent.name for path in folder.images})
    uneven = {len(path.parts): path for path in folder.images}
    if len(names) == 1 or len(uneven) > 1:
        found = f"all lie in {names[0]}/" if len(names) == 1 else f"not so {folder.abbreviate([*uneven.values()])}"
        raise ValueError(
            f"--train_data_dir={config.train_data_dir} has no column label: its classes are the folders of the "
            f"images, if there are several at one depth; {found}."
        )
    columns = {config.image_column: [str(path) for path in folder.images]}
    columns["label"] = [path.parent.name for path in folder.images]
    features = {config.image_column: datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

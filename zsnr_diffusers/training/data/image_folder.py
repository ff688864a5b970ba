"""The content of an image folder, and which part is used for training.

Folders are not read with `datasets`, which infers splits from names of files and folders and silently drops what it
does not consider training data. Here, skipped files are counted and some are listed.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...utils.image_formats import IMAGE_SUFFIXES
from ...utils.images import find_files, is_image
from ...utils.text import abbreviate
from ..config import DataConfig
from .metadata import METADATA_FILES
from .notices import notify, report_unusable

_FEW = 5
"""Names of files that a notice has."""

_TRAIN = ("train", "training")
_SPLITS = (*_TRAIN, "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Names of folders, in lower case, that are splits in `datasets`."""

_CONTAINERS = (".zip", ".tar", ".gz", ".7z", ".rar", ".parquet", ".arrow")


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder that are used for training.

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

    def abbreviate(self, paths: Sequence[Path]) -> str:
        """The first of some paths, relative to the root, and the number of the others."""
        return abbreviate([os.path.relpath(path, self.root) for path in paths], _FEW)

    def contains(self, path: Path) -> bool:
        """Whether a path lies in a part of the folder that is trained on."""
        return any(part in path.parents for part in self.parts)

    @property
    def metadata(self) -> list[Path]:
        """Metadata files of the image folder.

        Raises:
            ValueError: two in one folder.
        """
        found = [path for path in self.files if path.name in METADATA_FILES]
        for one, other in itertools.pairwise(found):
            if one.parent == other.parent:
                raise ValueError(f"{one} and {other.name} describe the same images: remove one of them.")
        return found


def open_image_folder(config: DataConfig) -> ImageFolder:
    """List the images and other files of `--train_data_dir`; only train/ if it holds splits.

    Raises:
        ValueError: there are no images, or some whose names are not UTF-8.
        OSError: no such folder.
    """
    return _select_train_split(_drop_undecodable_names(_scan_folder(config), config))


def _scan_folder(config: DataConfig) -> ImageFolder:
    """List images and other files of `--train_data_dir`, sorted, without what the run itself writes."""
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
        remedy = (
            f", but {packed}: extract archives, or pass .tar and .parquet as --train_shards, other tables as "
            "--dataset_name"
        )
        raise ValueError(f"--train_data_dir={config.train_data_dir} contains no images{remedy * bool(packed)}.")
    if packed:
        notify(f"{config.train_data_dir} also contains {packed}, which are not read")
    if hidden:
        notify(f"skipped hidden images: {len(hidden)} ({folder.abbreviate(hidden)})")
    return folder


def _drop_undecodable_names(folder: ImageFolder, config: DataConfig) -> ImageFolder:
    """Skip images whose names are not UTF-8, which tables cannot store."""
    bad = [path for path in folder.images if re.search("[\ud800-\udfff]", str(path))]
    names = [os.fsencode(path).decode(errors="backslashreplace") for path in bad]
    report_unusable(names, f"{len(names)} of {len(folder.images)} images have names that are not UTF-8", config)
    return replace(folder, images=[path for path in folder.images if path not in bad]) if bad else folder


def _select_train_split(folder: ImageFolder) -> ImageFolder:
    """Only train/ of a folder of splits; other folders are unchanged.

    All its subfolders must have names of splits, since `bus`, `car`, `train` and `truck` are classes.
    """
    base = Path(os.path.commonpath({path.parent for path in folder.images}))
    counts = Counter("" if path.parent == base else path.relative_to(base).parts[0] for path in folder.images)
    splits = [name for name in counts if name.lower() in _SPLITS]
    parts = tuple(base / name for name in splits if name.lower() in _TRAIN)
    others = [f"{name}/" for name in counts if name and name not in splits]
    if len(splits) < 2:
        return folder
    if others or not parts:
        shown = " and ".join(f"{name}/" for name in splits)
        reason = (
            f"with {abbreviate(others, _FEW)} next to them, they are not splits" if others else "there is no train/"
        )
        notify(f"all images are used, including those of {shown}: {reason}")
        return folder
    left_out = {name: count for name, count in counts.items() if base / name not in parts}
    shown = ", ".join(f"{count} of {name}/" if name else f"{count} next to it" for name, count in left_out.items())
    notify(f"images of {' and '.join(f'{part.name}/' for part in parts)} are used; skipped: {shown}")
    closed = [base / name for name in left_out if name]
    part = replace(folder, parts=parts)
    return replace(
        part,
        images=[path for path in folder.images if part.contains(path)],
        files=[path for path in folder.files if not any(one in path.parents for one in closed)],
    )

"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747, MIT license): 70,000 images of clothes in ten classes.

Read from the four files of its authors, such as Debian's package `dataset-fashion-mnist` brings, or from the Hub.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsnr_diffusers.utils.files import atomic_write

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
HUB_ID = "zalando-datasets/fashion_mnist"
INSTALL = (
    "install it by `apt-get install dataset-fashion-mnist` (Debian, Ubuntu; 31 MB), name a folder with the four "
    f"*-ubyte.gz files by --fashion_mnist, or a dataset of the Hub: --fashion_mnist {HUB_ID}"
)
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_SIZE = 28
_PARTS = {"train": "train", "test": "t10k"}

Bytes = NDArray[np.uint8]


@dataclass
class Clothes:
    """`images`, uint8 [n, h, h], and `labels`, int64 [n], of one part of the data."""

    images: Bytes
    labels: NDArray[np.int64]

    def first(self, n: int) -> "Clothes":
        """The first n of them; the files are in random order."""
        return Clothes(self.images[:n], self.labels[:n])

    def pictures(self) -> list[Image.Image]:
        """The images as Pillow's, grey."""
        return [Image.fromarray(image) for image in self.images]


def read_fashion_mnist(source: str, part: str, image_size: int = 32) -> Clothes:
    """Read 28 x 28 images, and pad them with black to 32 x 32; or halve them first, and pad them to 16 x 16.

    Args:
        source: a folder with the authors' files, or an id on the Hub with the columns `image` and `label`.
        part: `train` or `test`.
        image_size: 32 or 16.

    Raises:
        FileNotFoundError: there is no such folder or file; says how to get it.
        ValueError: a file that is truncated, damaged or of another kind.
    """
    if source == DEFAULT_FOLDER or Path(source).exists():
        prefix = Path(source, _PARTS[part])
        images = read_idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte.gz"))
        labels = read_idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte.gz"))
    else:
        images, labels = _read_from_hub(source, part)
    if images.shape[1:] != (_SIZE, _SIZE) or labels.shape != (len(images),):
        raise ValueError(
            f"{source} holds images {list(images.shape)} and labels {list(labels.shape)}, expected "
            f"[n, {_SIZE}, {_SIZE}] and [n]: it is not Fashion-MNIST; {INSTALL}"
        )
    return Clothes(_resized(images, image_size), labels.astype(np.int64))


def _resized(images: Bytes, image_size: int) -> Bytes:
    """Means of blocks of pixels, with a black margin of a sixteenth of the side."""
    block = 32 // image_size
    side, margin = _SIZE // block, (32 - _SIZE) // block // 2
    blocks = images.reshape(-1, side, block, side, block)
    means = np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return np.pad(means, ((0, 0), (margin, margin), (margin, margin)))


def read_idx(path: Path) -> Bytes:
    """Read a gzipped idx file of bytes: two zeros, the type 8, the number of dimensions, the dimensions, the data.

    Raises:
        FileNotFoundError: it is not there; says how to get it.
        ValueError: it is truncated, damaged or of another kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {INSTALL}")
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); download it again: {INSTALL}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of bytes (it begins with {data[:4].hex() or 'nothing'}); {INSTALL}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else ()
    if len(data) - start != math.prod(shape) or not shape:
        raise ValueError(f"{path} has {len(data) - start} values, its header says {list(shape)}; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_from_hub(name: str, part: str) -> tuple[Bytes, Any]:
    """Images and labels of a dataset of the Hub."""
    try:
        rows = datasets.load_dataset(name, split=part)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = f"{name} is no folder, and is not available on the Hub ({error})"
        raise FileNotFoundError(f"{reason}; {INSTALL}") from error
    if missing := {"image", "label"} - set(rows.column_names):
        raise ValueError(f"{name} has no column {sorted(missing)[0]}, only {', '.join(rows.column_names)}; {INSTALL}")
    return np.stack([np.asarray(image.convert("L")) for image in rows["image"]]), np.array(rows["label"])


def write_training_set(clothes: Clothes, folder: Path) -> Path:
    """Write images and classes as a parquet file, which `--dataset_name` opens, unless it is there.

    Returns:
        The folder.
    """
    path = folder / "train.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"image": clothes.pictures(), "label": clothes.labels}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        with atomic_write(path, shared=True) as partial:
            datasets.Dataset.from_dict(columns, features=features).to_parquet(partial)
    return folder

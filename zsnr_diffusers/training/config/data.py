"""Training data, and where values computed from it are stored."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option

ONE_SOURCE = "Pass the data as one of --dataset_name, --train_data_dir, --train_shards and --data_mix."

ENCODED_FILE = "encoded.json"
"""File in a finished folder of `zsnr encode`."""
_MOST_WORKERS = 8
"""Default maximum: enough for any single GPU, and each worker needs memory."""


def is_encoded(folder: str | None) -> bool:
    """Whether a folder contains precomputed data."""
    return folder is not None and Path(folder, ENCODED_FILE).is_file()


class Captions(NamedTuple):
    """Column and file extension of captions."""

    column: str
    extension: str
    """Extension of caption files in an image folder."""


@dataclass
class FolderConfig(Options):
    """Folders of a run."""

    output_dir: str = option("outputs/zsnr", "Folder for the pipeline, checkpoints, previews and logs.")
    cache_dir: str | None = option(
        None,
        "Folder for values computed once from the data; runs can share it, even at the same time. Default: `cache` "
        "in --output_dir.",
    )
    dry_run: bool = option(False, "Check everything, print changed options and the plan, and stop.")

    @property
    def cache_folder(self) -> Path:
        """Folder for values computed once from the data: `--cache_dir`, or `cache` in `--output_dir`."""
        return Path(self.output_dir, "cache") if self.cache_dir is None else Path(self.cache_dir)


@dataclass
class DataConfig(FolderConfig):
    """The training data and its order."""

    dataset_name: Annotated[str | None, IDENTITY] = option(
        None, "Dataset on the Hub, or anything that `datasets.load_dataset` opens."
    )
    train_data_dir: Annotated[str | None, IDENTITY] = option(
        None,
        "Folder of images at any depth, instead of --dataset_name; see the layouts below. A metadata.jsonl, .csv or "
        ".parquet in it or its subfolders describes the images: file_name, relative to the metadata file, and other "
        "columns. If a folder contains only train/ and test/ or validation/, train/ is used. Skipped images are "
        "counted and some are listed.",
    )
    train_shards: Annotated[str | None, IDENTITY] = option(
        None,
        "Files that are read remotely, instead of --dataset_name: hf://datasets/me/photos/data/train-*.parquet, "
        "s3://bucket/{0000..0127}.tar, /data/*.tar, or anything that fsspec opens. Parquet files contain images as "
        "bytes or in the format of `datasets`; row groups are read one by one, see --shard_cache_gb. Tars use "
        "WebDataset's layout, 0001.jpg with 0001.txt or 0001.json; samples are read by byte range, so the data does "
        "not need to fit on a disk. Before the start, only parquet footers and tar headers are read, once, and "
        "stored in --cache_dir. Images are not checked before the start; --on_bad_image applies when one is read.",
    )
    shuffle_shards: Annotated[int, POSITIVE, IDENTITY] = option(
        16,
        "Number of tars, or row groups of parquet files, whose samples are shuffled together; each epoch visits all "
        "of them in a new order. More improve mixing, fewer improve caching. The samples within one should already "
        "be mixed.",
    )
    shard_cache_gb: Annotated[float, NOT_NEGATIVE] = option(
        20.0,
        "GB of --train_shards to cache in --cache_dir, preferably on a local disk: decoded parquet row groups, and "
        "copies of remote tars, whose samples are read by range until they are copied. The least recently used are "
        "removed first. All processes of a machine share the cache, so each shard is read once per epoch, or only "
        "once if all fit. 0: nothing is written; every process and worker keeps --shuffle_shards row groups in "
        "memory, and reads tar samples by range.",
    )
    data_mix: Annotated[list[str], IDENTITY] = option(  # noqa: RUF009
        [],
        "Several datasets in one run, each a folder of images or a dataset on the Hub with its weight: photos=0.7 "
        "drawings=0.3. Weights determine the number of samples from each per 1,000 samples (with "
        "--aspect_ratio_buckets, per 1,000 global batches), in random order, independent of its size.",
    )
    image_column: str = option("image", "Column of the images.")
    resolution: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Pixels per side; images are resized and center-cropped. Default: the model's.",
    )
    random_flip: bool = option(False, "Flip half of the images horizontally.")
    on_bad_image: Literal["fail", "skip"] = option(
        "fail",
        "What to do about unreadable images: stop before training, or skip them. Both list them. In --train_shards "
        "they are detected during training: fail stops with a checkpoint, skip uses the next sample.",
    )
    rehash: bool = option(
        False,
        "Read all images and their cached values again at the start. By default, images are not opened if their size "
        "and modification time have not changed since they were last read, as recorded in --cache_dir.",
    )
    seed: Annotated[int, IDENTITY] = option(
        0, "Determines all randomness: the same seed gives the same weights, even if a run is interrupted."
    )
    dataloader_num_workers: Annotated[int | None, NOT_NEGATIVE] = option(
        None,
        "Number of data loading workers per training process; 0: the training process reads images itself, between "
        "steps. Default: on Linux one per available core, at most 8; elsewhere 0, since starting workers takes "
        "seconds.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.dataset_name, self.train_data_dir, self.train_shards, self.data_mix))) > 1:
            raise ValueError(ONE_SOURCE)
        names = [name for name, _ in self.mix_sources]
        if len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"--data_mix={self.data_mix} must name at least two different datasets.")

    @property
    def num_workers(self) -> int:
        """`--dataloader_num_workers`, or its default for this machine and its training processes."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        if not hasattr(os, "sched_getaffinity"):  # where processes are not forked
            return 0
        return min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def has_data(self) -> bool:
        """Whether a dataset, folder or shards are given; `--measure` runs without data."""
        return bool(self.dataset_name or self.train_data_dir or self.train_shards or self.data_mix)

    @property
    def mix_sources(self) -> list[tuple[str, float]]:
        """Names and weights of `data_mix`.

        Raises:
            ValueError: an entry has no name, or no weight above 0.
        """
        return [_parse_source(entry) for entry in self.data_mix]

    @property
    def columns(self) -> dict[str, str]:
        """Data columns to read, by the option that names each; the images' is the first."""
        return {"image_column": self.image_column}

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the sizes of all images must be known before the start."""
        return False

    @property
    def captions(self) -> Captions | None:
        """Column and file extension of captions; None if the model needs none."""
        return None

    @property
    def shard_index_folder(self) -> Path | None:
        """Folder for indices of `train_shards`; None in a dry run without `--cache_dir`, which writes nothing."""
        return None if self.dry_run and not self.cache_dir else self.cache_folder / "shards"

    @property
    def shard_data_folder(self) -> Path:
        """Folder for what is kept of `train_shards`: row groups of parquet files, copies of tars."""
        return self.cache_folder / "shard_data"


def _parse_source(entry: str) -> tuple[str, float]:
    """Name and weight of an entry of `data_mix`, `photos=0.7`."""
    name, separator, text = str(entry).rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not (separator and name and 0 < weight < float("inf")):
        raise ValueError(f"--data_mix={entry!r} must be a folder or dataset and a weight above 0, as in photos=0.7.")
    return name, weight

"""What a run is trained on, and where it may write what it computes of that."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option

ONE_SOURCE = "Pass the data as one of --dataset_name, --train_data_dir, --train_shards and --data_mix."

ENCODED_FILE = "encoded.json"
"""What a folder of data that `zsnr encode` has finished holds."""
_MOST_WORKERS = 8
"""By default: they feed any one GPU, and each takes memory."""


def is_encoded(folder: str | None) -> bool:
    """Whether a folder holds data that was encoded beforehand."""
    return folder is not None and Path(folder, ENCODED_FILE).is_file()


class Captions(NamedTuple):
    """Where the captions of the data stand."""

    column: str
    extension: str
    """Of caption files beside the images of a folder."""


@dataclass
class FolderConfig(Options):
    """Where a run may write."""

    output_dir: str = option("outputs/zsnr", "Where the pipeline, checkpoints, previews and logs go.")
    cache_dir: str | None = option(
        None,
        "Where what is computed of the data once is stored; runs may share it, also at the same time. Default: "
        "`cache` in --output_dir.",
    )
    dry_run: bool = option(False, "Check everything, print what is not at its default and the plan, and stop.")

    @property
    def cache_folder(self) -> Path:
        """Folder of what is computed from the data once: `--cache_dir`, or `cache` in `--output_dir`."""
        return Path(self.output_dir, "cache") if self.cache_dir is None else Path(self.cache_dir)


@dataclass
class DataConfig(FolderConfig):
    """What is trained on, in which order."""

    dataset_name: Annotated[str | None, IDENTITY] = option(
        None, "Dataset of the Hub, or anything `datasets.load_dataset` opens."
    )
    train_data_dir: Annotated[str | None, IDENTITY] = option(
        None,
        "Folder of images at any depth, instead of --dataset_name; layouts are below. A metadata.jsonl, .csv or "
        ".parquet in it, or in folders of it, describes its images: file_name, relative to itself, beside other "
        "columns. Of a folder that holds train/ beside test/ or validation/ and nothing else, train/ is used. Images "
        "that are left out are counted, and some of them named.",
    )
    train_shards: Annotated[str | None, IDENTITY] = option(
        None,
        "Files read from where they lie, instead of --dataset_name: hf://datasets/me/photos/data/train-*.parquet, "
        "s3://bucket/{0000..0127}.tar, /data/*.tar, or whatever fsspec opens. Parquet files hold columns, images as "
        "bytes or as `datasets` writes them; row groups are read one by one, see --shard_cache_gb. Tars are in "
        "WebDataset's layout, 0001.jpg beside 0001.txt or 0001.json; rows are read by range, so no disk has to hold "
        "them. Before the start, only footers of parquet files and headers in tars are read, once, and stored in "
        "--cache_dir. Images are not checked before the start: --on_bad_image counts when one comes up.",
    )
    shuffle_shards: Annotated[int, POSITIVE, IDENTITY] = option(
        16,
        "Tars, or row groups of parquet files, whose rows are shuffled together: each epoch takes all of them in "
        "another order, as many at a time. More mix better, fewer are kinder to caches between here and the data. "
        "Rows of one should be mixed already.",
    )
    shard_cache_gb: Annotated[float, NOT_NEGATIVE] = option(
        20.0,
        "GB of --train_shards that are kept in --cache_dir, best on a local disk: row groups of parquet, decoded, and "
        "copies of tars that lie elsewhere, of which rows are read by range until they are copied. The least "
        "recently used make room. All processes of a machine share them, so each is read once per epoch, or once at "
        "all if all fit. 0: nothing is written; every process and worker keeps --shuffle_shards row groups in memory, "
        "and reads rows of tars by range.",
    )
    data_mix: Annotated[list[str], IDENTITY] = option(  # noqa: RUF009
        [],
        "Several datasets in one run, each a folder of images or a dataset of the Hub with its weight: photos=0.7 "
        "drawings=0.3. So many of 1,000 samples come from each, in random order, however many images it has; with "
        "--aspect_ratio_buckets of 1,000 global batches.",
    )
    image_column: str = option("image", "Column of the images.")
    resolution: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Pixels per side; images are resized and centre-cropped. Default: the model's.",
    )
    random_flip: bool = option(False, "Mirror half of the images.")
    on_bad_image: Literal["fail", "skip"] = option(
        "fail",
        "What to do about images that cannot be read: stop before training, or leave them out. Both name them. Those "
        "of --train_shards are met on the way: fail ends with a checkpoint to continue from, skip shows the next row.",
    )
    rehash: bool = option(
        False,
        "Read all images and what is cached of them again at the start. Else those are not opened whose size and time "
        "of last change are as they were when they were last read whole, which is noted in --cache_dir.",
    )
    seed: Annotated[int, IDENTITY] = option(
        0, "Decides on all randomness: same seed, same weights, however often a run was interrupted."
    )
    dataloader_num_workers: Annotated[int | None, NOT_NEGATIVE] = option(
        None,
        "Processes that read images for each process that trains; 0: it reads them itself, between steps. Default: on "
        "Linux one for each core that falls to a process, 8 at most; elsewhere 0, since starting them takes seconds.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.dataset_name, self.train_data_dir, self.train_shards, self.data_mix))) > 1:
            raise ValueError(ONE_SOURCE)
        names = [name for name, _ in self.mix_sources]
        if len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"--data_mix={self.data_mix} must name two or more datasets, each once.")

    @property
    def num_workers(self) -> int:
        """`--dataloader_num_workers`, or its default for this machine and the processes that train on it."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        if not hasattr(os, "sched_getaffinity"):  # where processes are not forked
            return 0
        return min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def has_data(self) -> bool:
        """Whether a dataset, folder or shards are named; `--measure` runs without."""
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

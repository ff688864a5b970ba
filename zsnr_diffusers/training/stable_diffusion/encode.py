"""Precompute the latents and text embeddings of a dataset for training."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.tables import Text
from ...utils.terminal import show
from ..accelerator import create_accelerator
from ..automatic import resolve_mixed_precision
from ..checkpointing.lock import lock_run_folder
from ..checkpointing.run_folder import CONFIG_FILE
from ..config.data import ENCODED_FILE
from ..data.dataset import check_images, open_file_index
from ..data.encoded import write_encoded_rows
from ..data.row_values import ImageHashes, ImageSizes
from ..data.shard_formats import index_shards
from ..data.shards import THREADS
from ..launch_settings import hidden_fsdp_settings
from ..reporting.luminance import measure_data_luminance
from .config import CaptionedDataConfig, EncodingConfig
from .samples import CaptionedDataset
from .task import StableDiffusionTask

_NOT_OURS = ("model_index.json", CONFIG_FILE)
"""What a pipeline's or a run's folder holds."""

MATTERS = ("resolution", "aspect_ratio_buckets", "random_flip", "mixed_precision")
"""Options that a run on encoded data must have in common with the encoding."""


def encode(config: EncodingConfig) -> None:
    """Encode all data of a configuration into its `output_dir`, which is its `cache_dir` too.

    Each process encodes a part. The next run continues from the stored results of a killed one.

    Args:
        config: with base, data, size of images, flips and precision; `cache` is `both`.

    Raises:
        ValueError: model, data or options cannot be used, or the disk is too small.
        OSError: a file or repo is missing, or the folder cannot be written.
    """
    config = resolve_mixed_precision(config, {})
    folder = Path(config.output_dir)
    with contextlib.ExitStack() as lock, hidden_fsdp_settings():  # nothing is trained
        accelerator, processes = create_accelerator(config, 1, "none", config.output_dir)
        processes.run_on_main(lambda: _lock_folder(folder, lock))
        index_shards(config, processes)
        task = processes.main_first(lambda: StableDiffusionTask(config))
        images = processes.run_on_main(lambda: check_images(task.rows, config, index=open_file_index(config)))
        samples = task.samples(images)
        task.embedding_cache.plan(accelerator, processes, samples, config.cache_folder)
        if processes.is_main:
            show(Text("\n".join(f"{name}: {one}" for name, one in task.embedding_cache.statuses.items())))
        task.embedding_cache.populate(accelerator, processes, samples)
        processes.run_on_main(lambda: _write_rows(config, task, samples, accelerator.mixed_precision))
        accelerator.print(f"Encoded {len(samples.usable_rows):,} images: train with --train_data_dir {folder}")
        processes.drain()


def _lock_folder(folder: Path, lock: contextlib.ExitStack) -> None:
    """Lock a folder that is empty or holds encoded data; samples that changed are encoded again."""
    others = [path.name for path in folder.glob("*") if path.name in _NOT_OURS]
    if others:
        raise ValueError(f"--output_dir={folder} holds {', '.join(others)}: choose a separate folder.")
    lock.enter_context(lock_run_folder(folder))
    (folder / ENCODED_FILE).unlink(missing_ok=True)  # until all is there again


def _write_rows(
    config: CaptionedDataConfig, task: StableDiffusionTask, samples: CaptionedDataset, precision: str
) -> None:
    """Write the table of the encoded rows, with the settings of the encoding."""
    usable = list(samples.usable_rows)
    with ThreadPoolExecutor(THREADS) as pool:  # rows of shards are read again for it, and may lie far away
        sizes = ImageSizes.of(enumerate(pool.map(samples.image_size, usable)))
        captions = list(pool.map(lambda row: samples.captions[row][config.caption_column], usable))
    digests = b"".join(samples.hashes[row] for row in usable)
    hashes = ImageHashes(np.arange(len(usable)), np.frombuffer(digests, np.uint8).reshape(-1, 32))
    facts: dict[str, Any] = {
        "options": {name: getattr(config, name) for name in MATTERS}
        | {"resolution": task.resolution, "mixed_precision": precision},
        "encoders": {part.name: part.facts for part in task.embedding_cache.parts},
        "luminance": measure_data_luminance(task, samples.usable_rows).tolist(),
    }
    images = [task.rows[row][config.image_column] for row in usable]
    names = [Path(image["path"] or f"row {row}").name for row, image in zip(usable, images, strict=True)]
    write_encoded_rows(Path(config.output_dir), facts, names, captions, sizes, hashes)

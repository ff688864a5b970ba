"""Decide which encoder results to cache, and compute the missing ones."""

import atexit
import contextlib
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...hub.weight_files import suppress_empty_float32_warnings
from ...utils.distributed import Processes
from ..accelerator import mixed_precision_dtype
from ..data.dataset import hash_images
from ..data.encoded import EncodedRows
from ..data.file_index import FileIndex
from .config import CaptionedDataConfig
from .encoders import Autoencoder, FrozenEncoder
from .row_cache import Cache, Rows
from .samples import CaptionedDataset

_SHARE_OF_DISK = 0.5
"""Maximum fraction of the free space for `--cache auto`, since checkpoints and other users need some too."""


@dataclass
class CacheStatus:
    """Which results of an encoder are cached, and which are to be cached."""

    cache: Cache
    count: int
    row_bytes: tuple[int, int]
    """The least and the most that one takes."""
    missing: dict[bytes, Any]
    """How to load them, by content."""
    missing_bytes: int
    """On disk."""
    enabled: bool = True

    def __str__(self) -> str:
        if not self.enabled:
            missing = _format_bytes(self.missing_bytes)
            return f"no: {missing} exceed the available space in {self.cache.folder.parent}"
        each = " to ".join(dict.fromkeys(map(_format_bytes, self.row_bytes)))
        damaged = f", {len(self.cache.damaged)} files damaged" if self.cache.damaged else ""
        return (
            f"{self.count:,} of {each} each: {self.count - len(self.missing):,} stored{damaged}, "
            f"{len(self.missing):,} to compute ({_format_bytes(self.missing_bytes)}), in {self.cache.folder}"
        )


class EmbeddingCache:
    """Which results of the frozen encoders are cached.

    Args:
        config: with what may be stored.
        parts: most costly first.
        index: of what is known of files.
        encoded: rows that were encoded beforehand, if the data are such.
        reload: gives the weights of all parts back to their networks, after training on such data went without.
    """

    def __init__(
        self,
        config: CaptionedDataConfig,
        parts: Sequence[FrozenEncoder],
        index: FileIndex | None = None,
        encoded: EncodedRows | None = None,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.parts, self.index = config, parts, index or FileIndex()
        self.encoded, self._reload = encoded, reload
        self._dtypes: dict[str, torch.dtype] = {}
        self.statuses: dict[str, CacheStatus] = {}
        self.device = torch.device("cpu")

    def plan(
        self,
        accelerator: Accelerator,
        processes: Processes,
        samples: CaptionedDataset,
        folder: Path,
        count: int | None = None,
    ) -> None:
        """Find which encoder results of a run are cached, and choose which of the missing ones to cache.

        Args:
            accelerator: of the run.
            processes: of the run; the others wait for the main one, who hashes all images, as long as it takes.
            samples: that it draws.
            folder: of caches; the main process's counts.
            count: samples that the run will show; None for all rows.

        Raises:
            ValueError: what `--cache` asks for does not fit on the disk.
        """
        half = mixed_precision_dtype(accelerator)
        self.statuses, samples.hashes = processes.run_on_main(
            lambda: self._find_statuses(half, samples, folder, count)
        )

    def _find_statuses(
        self, half: torch.dtype | None, samples: CaptionedDataset, folder: Path, count: int | None
    ) -> tuple[dict[str, CacheStatus], Mapping[int, bytes]]:
        """Status of each encoder that may be cached, by name, and the hashes of the images, by row."""
        rows = list(samples.usable_rows) if count is None else samples.rows_seen(count)
        indices = [*rows, *samples.held_out] if self.config.cached else []
        if self.encoded is not None:
            samples.hashes, folder = self.encoded.hashes, self.encoded.folder
        elif Autoencoder.name in self.config.cached:
            samples.hashes = hash_images(samples.rows, self.config.image_column, indices, self.index)
        statuses = {
            part.name: _cache_status(part, samples, indices, folder, part.arithmetic_dtype(half), self.index)
            for part in self.parts
            if part.name in self.config.cached
        }
        if self.encoded is not None:
            check_encoded(self.encoded, samples, statuses, self.parts)
        _disable_what_does_not_fit(list(statuses.values()), folder, self.config.cache)
        return statuses, samples.hashes

    @property
    def stored(self) -> dict[str, CacheStatus]:
        """Status of those encoders whose results are read from the cache during training."""
        return {name: status for name, status in self.statuses.items() if status.enabled}

    def populate(self, accelerator: Accelerator, processes: Processes, samples: CaptionedDataset) -> dict[str, float]:
        """Compute missing encoder results, each process a share, and let `samples` read the cache.

        Parts whose results are stored end on the CPU, the others on the device.

        Returns:
            Seconds that each part took.

        Raises:
            ValueError: processes do not see each other's files.
            OSError: the files cannot be written.
        """
        self.device = accelerator.device
        seconds, half = {}, mixed_precision_dtype(accelerator)
        for part in self.parts:
            status, started = self.stored.get(part.name), time.perf_counter()
            if dtype := part.arithmetic_dtype(half):
                self._dtypes[part.name] = dtype
                with suppress_empty_float32_warnings():
                    part.network.to(dtype)
            if status is None or status.missing:
                part.move(accelerator.device)
            if status is not None:
                _populate_part(processes, part, status, samples)
                part.move("cpu" if self.encoded is None else "meta")
            seconds[part.name] = time.perf_counter() - started
        samples.caches = {name: status.cache for name, status in self.stored.items()}
        return seconds

    @contextlib.contextmanager
    def ready_to_generate(self) -> Iterator[None]:
        """Context with all encoders on the device, also those whose results are cached.

        What would overflow in float16 is kept out of an autocast to it; the UNet brings its own autocast along.
        """
        place, precision = self.device.type, contextlib.ExitStack()
        overflows = any(part.arithmetic_dtype(torch.float16) == torch.float32 for part in self.parts)
        if overflows and torch.get_autocast_dtype(place) == torch.float16:
            precision.enter_context(torch.autocast(place, enabled=False))
        if self.encoded is not None:
            self._reload()
        for part in self.parts:
            part.move(self.device, self._dtypes.get(part.name))
        try:
            with precision:
                yield
        finally:
            for part in self.parts:
                if part.name in self.stored:
                    part.move("cpu" if self.encoded is None else "meta")

    def benchmark(self, accelerator: Accelerator, processes: Processes, samples: CaptionedDataset) -> float:
        """Cache what a few samples need, in a temporary folder, to time it.

        Returns:
            The hours that everything that is missing would take.
        """
        missing = {name: len(status.missing) for name, status in self.stored.items()}
        folder = Path()
        if processes.is_main:
            folder = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.plan(accelerator, processes, samples, folder)
        seconds = self.populate(accelerator, processes, samples)
        return sum(seconds[name] * missing.get(name, 0) / self.stored[name].count for name in self.stored) / 3600


def check_encoded(
    encoded: EncodedRows,
    samples: CaptionedDataset,
    statuses: Mapping[str, CacheStatus],
    parts: Sequence[FrozenEncoder],
) -> None:
    """Refuse data that were encoded by other networks or with other settings than the run's.

    Raises:
        ValueError: with what differs.
    """
    missing = {name: len(status.missing) for name, status in statuses.items() if status.missing}
    if not missing:
        return
    differ = []
    for part in parts:
        there = encoded.facts["encoders"][part.name]
        differ += [f"{fact} of {part.name}" for fact, value in part.facts.items() if there.get(fact) != value]
    here = {
        "resolution": samples.resolution,
        "aspect_ratio_buckets": samples.config.aspect_ratio_buckets,
        "random_flip": samples.config.random_flip,
    }
    for name, value in here.items():
        if (was := encoded.facts["options"][name]) != value:
            differ.append(f"--{name}, {was} there and {value} here")
    lacking = " and ".join(f"{count:,} {name}" for name, count in missing.items())
    raise ValueError(
        f"--train_data_dir={encoded.folder} lacks {lacking} of this run. Differences: "
        f"{'; '.join(differ) or 'none, so some of its files are missing'}. Train with the settings of the encoded "
        "data, or encode it again for this run."
    )


def _cache_status(
    part: FrozenEncoder,
    samples: CaptionedDataset,
    indices: list[int],
    folder: Path,
    dtype: torch.dtype | None,
    index: FileIndex,
) -> CacheStatus:
    """Which results of an encoder for these data rows are cached and which are missing."""
    part.facts = part.cache_facts(dtype)
    cache = Cache(folder, part.name, part.facts, index)
    inputs = part.unique_inputs(samples, indices)
    missing = {content: inputs[content] for content in cache.find_missing(inputs)}
    itemsize = (dtype or part.dtype).itemsize
    row_bytes = {content: itemsize * part.values_per_row(samples, key) for content, key in inputs.items()}
    extremes = min(row_bytes.values()), max(row_bytes.values())
    return CacheStatus(cache, len(inputs), extremes, missing, sum(row_bytes[content] for content in missing))


def _disable_what_does_not_fit(statuses: Sequence[CacheStatus], folder: Path, choice: str) -> None:
    """Disable caches whose missing results do not fit on the disk; an error if they were asked for."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    left = free * _SHARE_OF_DISK if choice == "auto" else free
    for status in statuses:
        status.enabled = status.missing_bytes <= left
        left -= status.missing_bytes * status.enabled
    if choice != "auto" and not all(status.enabled for status in statuses):
        needed = _format_bytes(sum(status.missing_bytes for status in statuses))
        raise ValueError(
            f"--cache={choice} needs {needed} in {folder}, where {_format_bytes(free)} are free: use a --cache_dir on "
            "another disk, or pass --cache=auto or none."
        )


def _populate_part(processes: Processes, part: FrozenEncoder, status: CacheStatus, samples: CaptionedDataset) -> None:
    """Compute this process's share of an encoder's missing results and write them to the cache."""
    with processes.sync_errors():
        if processes.is_main:
            status.cache.prune()
        share = dict(list(status.missing.items())[processes.rank :: processes.size])
        status.cache.write(_encode_inputs(part, share, samples, progress=processes.is_main))
    if lost := status.cache.find_missing(status.missing, verify=False):
        raise ValueError(
            f"{len(lost)} of {len(status.missing)} results that were just stored in {status.cache.folder} are "
            "missing: use a --cache_dir that all processes share."
        )
    status.missing = {}


def _encode_inputs(
    part: FrozenEncoder, inputs: dict[bytes, Any], samples: CaptionedDataset, progress: bool
) -> Iterator[tuple[list[bytes], Rows]]:
    """Batches of cache contents and the encoder's results for them."""
    config, contents = samples.config, list(inputs)
    batches = _batch_by_shape(part, samples, list(inputs.values()))
    loader = DataLoader(
        _Inputs(part.load, samples, list(inputs.values())),
        batch_sampler=batches,
        num_workers=config.num_workers if inputs else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    with tqdm(
        desc=f"storing {part.name}", total=len(inputs), disable=not (progress and inputs), unit=part.label
    ) as bar:
        for places, batch in zip(batches, loader, strict=True):
            n = len(batch)
            # Padded, since kernels for other batch sizes round differently: results must not depend on the batch.
            full = torch.cat([batch, batch[-1:].expand(part.batch_size - n, *batch.shape[1:])])
            yield [contents[place] for place in places], {name: rows[:n] for name, rows in part(full).items()}
            bar.update(n)


def _batch_by_shape(part: FrozenEncoder, samples: CaptionedDataset, inputs: list[Any]) -> list[list[int]]:
    """Indices of encoder inputs in batches of one shape."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(inputs):
        places[part.input_shape(samples, key)].append(place)
    size = part.batch_size
    return [alike[at : at + size] for alike in places.values() for at in range(0, len(alike), size)]


class _Inputs(Dataset[Tensor]):
    def __init__(self, load: Any, samples: CaptionedDataset, inputs: list[Any]) -> None:
        self.load, self.samples, self.inputs = load, samples, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> Tensor:
        loaded: Tensor = self.load(self.samples, self.inputs[place])
        return loaded


def _format_bytes(count: float) -> str:
    """A number of bytes with a decimal unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"

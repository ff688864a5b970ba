"""Which results of the frozen parts are stored, and the work of storing them."""

import atexit
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...hub.weight_files import without_empty_warnings
from ..accelerator import half_precision
from .config import TrainingConfig
from .encoders import FrozenEncoder
from .row_cache import Cache, Rows
from .samples import CaptionedSamples

_SHARE_OF_DISK = 0.5
"""Of the free space, which `--cache auto` takes at most: checkpoints and other people need some too."""


@dataclass
class Stock:
    """What is stored of a part's results, and what is to be."""

    cache: Cache
    count: int
    row_bytes: tuple[int, int]
    """The least and the most that one takes."""
    missing: dict[bytes, Any]
    """How to load them, by content."""
    missing_bytes: int
    """On disk."""
    taken: bool = True

    def __str__(self) -> str:
        if not self.taken:
            return f"no: {_size(self.missing_bytes)} are more than there is to spare in {self.cache.folder.parent}"
        each = " to ".join(dict.fromkeys(map(_size, self.row_bytes)))
        damaged = f", {len(self.cache.damaged)} files damaged" if self.cache.damaged else ""
        return (
            f"{self.count:,} of {each} each: {self.count - len(self.missing):,} stored{damaged}, "
            f"{len(self.missing):,} to compute ({_size(self.missing_bytes)}), in {self.cache.folder}"
        )


class Caches:
    """What is stored of the results of frozen parts.

    Args:
        config: of the run.
        parts: most costly first.
    """

    def __init__(self, config: TrainingConfig, parts: Sequence[FrozenEncoder]) -> None:
        self.config, self.parts = config, parts
        self.stocks: dict[str, Stock] = {}

    def look_up(
        self, accelerator: Accelerator, samples: CaptionedSamples, folder: Path, rows: Sequence[int] | None = None
    ) -> None:
        """Find out what is stored of all that a run will need, and choose what to store.

        Args:
            accelerator: of the run.
            samples: that it draws.
            folder: of caches; the main process's counts.
            rows: that are needed; by default those that the run will show.

        Raises:
            ValueError: what `--cache` asks for does not fit on the disk.
        """
        if accelerator.is_main_process:
            config = self.config
            count = config.max_train_steps * config.global_batch(accelerator.num_processes)
            indices = (samples.shown(count) if rows is None else list(rows)) if config.cached else []
            half = half_precision(accelerator)
            self.stocks = {
                part.name: _stock(part, samples, indices, folder, part.precision(half))
                for part in self.parts
                if part.name in config.cached
            }
            _fit_on_disk(list(self.stocks.values()), folder, config.cache)
        self.stocks, samples.hashes = broadcast_object_list([self.stocks, samples.hashes])

    @property
    def stored(self) -> dict[str, Stock]:
        """Those of parts whose results are read during training."""
        return {name: stock for name, stock in self.stocks.items() if stock.taken}

    def fill(self, accelerator: Accelerator, samples: CaptionedSamples) -> dict[str, float]:
        """Compute what is missing, each process a share, and have `samples` read what is stored.

        Parts whose results are stored end on the CPU, the others on the device.

        Returns:
            Seconds that each part took.

        Raises:
            ValueError: processes do not see each other's files.
            OSError: the files cannot be written.
        """
        seconds, half = {}, half_precision(accelerator)
        for part in self.parts:
            stock, started = self.stored.get(part.name), time.perf_counter()
            if dtype := part.precision(half):
                with without_empty_warnings():
                    part.network.to(dtype)
            if stock is None or stock.missing:
                part.network.to(accelerator.device)
            if stock is not None:
                _fill(accelerator, part, stock, samples)
                part.network.to("cpu")
            seconds[part.name] = time.perf_counter() - started
        samples.caches = {name: stock.cache for name, stock in self.stored.items()}
        return seconds

    def rehearse(self, accelerator: Accelerator, samples: CaptionedSamples) -> float:
        """Store what a few samples need, for as long as the process lives.

        Returns:
            The hours that everything that is missing would take.
        """
        missing = {name: len(stock.missing) for name, stock in self.stored.items()}
        if accelerator.is_main_process:
            folder = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            self.look_up(accelerator, samples, folder, samples.good)
        else:
            self.look_up(accelerator, samples, Path())
        seconds = self.fill(accelerator, samples)
        return sum(seconds[name] * missing.get(name, 0) / self.stored[name].count for name in self.stored) / 3600


def _stock(
    part: FrozenEncoder, samples: CaptionedSamples, indices: list[int], folder: Path, dtype: torch.dtype | None
) -> Stock:
    cache = Cache(folder, part.name, part.facts(dtype))
    inputs = part.inputs(samples, indices)
    missing = {content: inputs[content] for content in cache.find(inputs)}
    itemsize = (dtype or part.dtype).itemsize
    row_bytes = {content: itemsize * part.row_values(samples, known) for content, known in inputs.items()}
    extremes = min(row_bytes.values()), max(row_bytes.values())
    return Stock(cache, len(inputs), extremes, missing, sum(row_bytes[content] for content in missing))


def _fit_on_disk(stocks: Sequence[Stock], folder: Path, choice: str) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    left = free * _SHARE_OF_DISK if choice == "auto" else free
    for stock in stocks:
        stock.taken = stock.missing_bytes <= left
        left -= stock.missing_bytes * stock.taken
    if choice != "auto" and not all(stock.taken for stock in stocks):
        needed = _size(sum(stock.missing_bytes for stock in stocks))
        raise ValueError(
            f"--cache={choice} needs {needed} in {folder}, where {_size(free)} are free: name a --cache_dir on "
            "another disk, or pass --cache=auto or none."
        )


def _fill(accelerator: Accelerator, part: FrozenEncoder, stock: Stock, samples: CaptionedSamples) -> None:
    if accelerator.is_main_process:
        stock.cache.tidy()
    share = dict(list(stock.missing.items())[accelerator.process_index :: accelerator.num_processes])
    stock.cache.write(_results(part, share, samples, progress=accelerator.is_main_process))
    accelerator.wait_for_everyone()
    if lost := stock.cache.find(stock.missing, verify=False):
        raise ValueError(
            f"{len(lost)} of {len(stock.missing)} results that were just stored in {stock.cache.folder} are not "
            "there: name a --cache_dir that all processes share."
        )
    stock.missing = {}


def _results(
    part: FrozenEncoder, inputs: dict[bytes, Any], samples: CaptionedSamples, progress: bool
) -> Iterator[tuple[list[bytes], Rows]]:
    """Contents, and what the part gives for them."""
    config, contents = samples.config, list(inputs)
    batches = _batches(part, samples, list(inputs.values()))
    loader = DataLoader(
        _Inputs(part.load, samples, list(inputs.values())),
        batch_sampler=batches,
        num_workers=config.dataloader_num_workers if inputs else 0,
        generator=torch.Generator(),
    )
    with tqdm(desc=f"storing {part.name}", total=len(inputs), disable=not progress, unit=part.unit) as bar:
        for places, batch in zip(batches, loader, strict=True):
            n = len(batch)
            # Filled up, since kernels for other batch sizes round otherwise: results must not depend on their company.
            full = torch.cat([batch, batch[-1:].expand(part.batch_size - n, *batch.shape[1:])])
            yield [contents[place] for place in places], {name: rows[:n] for name, rows in part(full).items()}
            bar.update(n)


def _batches(part: FrozenEncoder, samples: CaptionedSamples, inputs: list[Any]) -> list[list[int]]:
    """Places of inputs, those of one shape together."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, known in enumerate(inputs):
        places[part.shape(samples, known)].append(place)
    size = part.batch_size
    return [alike[at : at + size] for alike in places.values() for at in range(0, len(alike), size)]


class _Inputs(Dataset[Tensor]):
    def __init__(self, load: Any, samples: CaptionedSamples, inputs: list[Any]) -> None:
        self.load, self.samples, self.inputs = load, samples, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> Tensor:
        loaded: Tensor = self.load(self.samples, self.inputs[place])
        return loaded


def _size(count: float) -> str:
    """Bytes in words."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"

"""Training batches that depend only on the seed and their position in the run.

A run is one endless sequence of samples. The sample at a position, with all its randomness (image, caption, flip,
dropout, timestep, noise), is a function of (seed, position). So a run gives the same weights with any interruptions,
number of workers, and division of the global batch over processes and accumulation. (Network dropout is seeded per
forward pass, by (seed, step, pass, process).)
"""

import functools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ...utils.images import ImageError
from ..checkpointing.signals import ignore_stop_signals
from ..config import DataConfig, OptimizationConfig
from .buckets import epoch_order, round_up_to_batches
from .dataset import SOURCE_COLUMN, Rows
from .mix import Mix
from .shards import ShardDataset
from .shuffle import RowGroups, ShardShuffle

Batch = dict[str, Tensor]

_MOST_SKIPPED = 16
"""Maximum number of consecutive bad rows; more indicate a different problem."""


def derive_seed(*key: int) -> int:
    """Hash a key to a 64-bit seed, so that neighboring keys have unrelated random streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def make_generator(*key: int) -> torch.Generator:
    """A torch generator seeded by a key."""
    return torch.Generator().manual_seed(derive_seed(*key))


class TrainingDataset(Dataset[Batch], ABC):
    """The endless sequence of training samples, by position.

    Args:
        rows: from `open_rows`.
        usable_rows: indices of the rows to use, from `check_images`.
        config: of the run.
        groups: the usable rows by group, if a batch may contain only one group.
        batch: number of samples with the same group: the global batch if there are groups.
        noise_offset: standard deviation of a constant offset per channel.
        held_out: rows kept aside for validation, none of `usable_rows`.
    """

    def __init__(
        self,
        rows: Rows,
        usable_rows: Collection[int],
        config: DataConfig,
        groups: Collection[Sequence[int]] = (),
        batch: int = 1,
        noise_offset: float = 0.0,
        held_out: Sequence[int] = (),
    ) -> None:
        self.rows, self.seed, self.noise_offset, self.held_out = rows, config.seed, noise_offset, held_out
        self.skips_bad_images = isinstance(rows, ShardDataset) and config.on_bad_image == "skip"
        shards = isinstance(rows, ShardDataset) and 2 * len(usable_rows) > len(rows)  # else some are tried out
        self._shards = rows.shards.all if shards and isinstance(rows, ShardDataset) else []
        self.shuffle_shards = config.shuffle_shards
        # Of shards there may be more rows than memory has room for.
        whole = self._shards and len(usable_rows) == len(rows)
        self.usable_rows: Sequence[int] = range(len(usable_rows)) if whole else array("q", usable_rows)
        self.groups, self.batch = list(groups) or [self.usable_rows], batch
        self.mix = Mix([weight for _, weight in config.mix_sources], config.seed) if config.data_mix else None
        self._names = [name for name, _ in config.mix_sources]
        self._groups_of = [self.groups] if self.mix is None else split_by_source(rows, self.groups, self._names)
        self._lengths = [sum(round_up_to_batches(len(group), batch) for group in one) for one in self._groups_of]
        self.epoch_length = sum(self._lengths)
        """Samples in an epoch, of a mix in one of each source."""
        self._orders: dict[tuple[int, int], Sequence[int]] = {}

    def _epoch_order(self, epoch: int, source: int = 0) -> Sequence[int]:
        """Row of each position in an epoch of a source; those of the last two epochs are kept."""
        order = self._orders.get((source, epoch))
        if order is None:
            for old in [key for key in self._orders if key[0] == source][:-1]:
                self._orders.pop(old, None)
            self._orders[source, epoch] = order = self._make_epoch_order(epoch, source)
        return order

    def _make_epoch_order(self, epoch: int, source: int) -> Sequence[int]:
        """Row of each position in an epoch of a source."""
        if self._shards:
            counts = [shard.rows for shard in self._shards]
            stream = functools.partial(make_generator, self.seed, 0, epoch)
            return ShardShuffle(counts, self.shuffle_shards, stream, self._row_groups, self.batch)
        key = (epoch,) if self.mix is None else (epoch, source)
        return epoch_order(self._groups_of[source], self.batch, make_generator(self.seed, 0, *key))

    @functools.cached_property
    def _row_groups(self) -> RowGroups | None:
        """The groups of the rows of shards; None if all rows are alike."""
        if len(self.groups) == 1 and len(self.groups[0]) == len(self.rows):
            return None
        return RowGroups(self.groups, [shard.rows for shard in self._shards])

    def row_at(self, position: int) -> int:
        """Index of the data row of the sample at a position."""
        source = 0
        if self.mix is not None:
            unit, place = divmod(position, self.batch)
            source, before = self.mix.locate(unit)
            position = before * self.batch + place
        epoch, place = divmod(position, self._lengths[source])
        return self._epoch_order(epoch, source)[place]

    def rows_seen(self, count: int) -> list[int]:
        """Data rows of the first `count` positions, each once."""
        counts = [count]
        if self.mix is not None:
            counts = [units * self.batch for units in self.mix.counts_before(-(-count // self.batch))]
        parts = [self._epoch_order(0, source)[:some] for source, some in enumerate(counts)]
        shown = np.concatenate([np.asarray(part, np.int64) for part in parts])
        rows: list[int] = shown[np.sort(np.unique(shown, return_index=True)[1])].tolist()
        return rows

    def describe_mix(self, count: int) -> dict[str, str]:
        """Lines of the plan about each source of a mix, for this number of samples."""
        if self.mix is None:
            return {}
        shown = zip(self._names, self.mix.shares, self._groups_of, self._lengths, strict=True)
        return {
            name: f"{share:.1%} of the samples: {sum(map(len, groups)):,} images, {count * share / length:,.1f} epochs"
            for name, share, groups, length in shown
        }

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position: the result of `sample` for its row and random generator.

        Raises:
            ImageError: the row and, if bad images are skipped, all following candidates cannot be read.
        """
        for place in range(position, position + _MOST_SKIPPED):
            draw = make_generator(self.seed, 1, position)
            try:
                batch = self.sample(self.row_at(place), draw)
                break
            except ImageError as error:
                if not self.skips_bad_images or place == position + _MOST_SKIPPED - 1:
                    raise
                tqdm.write(f"{error}; using the next row instead")
        if self.noise_offset:
            shift = torch.randn(len(batch["noise"]), 1, 1, generator=draw)
            batch["noise"] += self.noise_offset * shift
        return batch

    def validation_sample(self, row: int) -> Batch:
        """The sample of a row that is kept aside, always the same."""
        return self.sample(row, make_generator(self.seed, 9, row), augment=False)

    @abstractmethod
    def sample(self, index: int, draw: torch.Generator, augment: bool = True) -> Batch:
        """Create a training sample from a data row, with all randomness from `draw`.

        Args:
            index: of the row.
            draw: all that is random.
            augment: whether images are mirrored or cropped at random and captions or classes changed or dropped.

        Returns:
            At least `timestep`, uniform over all, and `noise`, N(0, 1) in the shape [C, H, W] of x_0.
        """


def split_by_source(rows: Rows, groups: Sequence[Sequence[int]], names: Sequence[str]) -> list[list[Sequence[int]]]:
    """The groups of rows of each source of a mix, without empty ones.

    Raises:
        ValueError: a source has no row that can be used.
    """
    source_of = np.asarray(rows.data.column(SOURCE_COLUMN)) if isinstance(rows, datasets.Dataset) else np.empty(0)
    arrays = [np.asarray(group, np.int64) for group in groups]
    found: list[list[Sequence[int]]] = []
    for source, name in enumerate(names):
        parts = [array("q", rows[source_of[rows] == source].tobytes()) for rows in arrays]
        found.append([part for part in parts if part])
        if not found[-1]:
            raise ValueError(f"--data_mix: {name} has no usable images.")
    return found


class DistributedBatchSampler(Sampler[list[int]]):
    """The positions of the sequence for each forward pass of this process.

    A step's global batch is a contiguous range, divided into forward passes, and these into processes.

    Args:
        config: with the batch sizes.
        steps: range of optimizer steps, starting from 0.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, config: OptimizationConfig, steps: range, rank: int, world_size: int) -> None:
        self.batch_size, self.rank, self.world_size = config.train_batch_size, rank, world_size
        per_step = config.gradient_accumulation_steps
        self.passes = range(steps.start * per_step, steps.stop * per_step)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            first = (forward_pass * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def create_dataloader(
    samples: Dataset[Batch], positions: DistributedBatchSampler, config: DataConfig
) -> DataLoader[Batch]:
    """A DataLoader of samples that does not use torch's global generator."""
    return DataLoader(
        samples,
        batch_sampler=positions,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals,
    )

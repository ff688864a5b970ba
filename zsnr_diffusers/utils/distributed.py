"""Share work between the processes of `accelerate launch`; a single process does all of it.

Independent of images: a list is split, results are gathered, and an error in one process stops all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from .extras import import_extra

T = TypeVar("T")

TIMEOUT = timedelta(days=30)
"""Timeout for other processes, which may be generating; the launcher stops processes that wait for a dead one."""


class ProcessError(RuntimeError):
    """Another process failed; has its error message."""


class Processes:
    """A single process: it has all data and never waits."""

    rank, size = 0, 1
    device: Any = None
    """Device for this process's networks; None for the default."""

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes and prints for all."""
        return self.rank == 0

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`; the parts of all ranks, concatenated, are `items`."""
        n = len(items)
        return items[n * self.rank // self.size : n * (self.rank + 1) // self.size]

    def gather(self, value: T) -> list[T]:
        """The value of every process in the order of ranks, in each of them."""
        return [value]

    def broadcast(self, value: T) -> T:
        """The main process's value, in every process."""
        return value

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Wait at the end until all processes arrive, and stop all of them if one failed inside.

        Raises:
            ProcessError: another process failed; errors of this process pass unchanged.
        """
        yield

    def main_first(self, work: Callable[[], T]) -> T:
        """Call `work` in every process, in the main process first."""
        with self.sync_errors():
            result = [work()] if self.is_main else []
        return result[0] if self.is_main else work()

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call `work` only in the main process, and return its result in every process."""
        with self.sync_errors():
            result = [work()] if self.is_main else []
        return self.broadcast(result)[0]

    def drain(self) -> None:
        """Wait until exchanged data is freed; call before the process group is destroyed."""

    def close(self) -> None:
        """Leave the process group; no communication is possible afterwards."""


class LaunchedProcesses(Processes):
    """The processes of `accelerate launch` or torchrun, each with a device of its own."""

    def __init__(self) -> None:
        on_cpu = import_extra("accelerate.utils").parse_flag_from_env("ACCELERATE_USE_CPU")
        self.device = import_extra("accelerate").PartialState(cpu=on_cpu).device
        from torch import distributed

        self._distributed = distributed
        # Without a GPU and without an explicit request for the CPU, accelerate joins the group but reports a single
        # process.
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        # NCCL would use GPU memory for objects, and has a timeout of ten minutes.
        self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(self, value: T) -> list[T]:
        """The value of every process in the order of ranks, in each of them; values are pickled."""
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """The main process's value, in every process; pickled, and only the main process sends data."""
        values = [value if self.is_main else None]
        self._distributed.broadcast_object_list(values, src=0, group=self._group)
        return cast("T", values[0])

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Raise in all processes if one failed inside, see `Processes.sync_errors`."""
        failure = None
        try:
            yield
        except Exception as error:  # any error must be reported to the other processes
            failure = error
        messages = self.gather(None if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise ProcessError(f"process {rank}: {message}")

    def drain(self) -> None:
        """Let the group's threads free the last exchanged data, for which they need the GIL.

        torch 2.6 destroys a group while holding the GIL and waits for its threads, which can deadlock.
        """
        time.sleep(0.1)

    def close(self) -> None:
        """Leave the process group."""
        self.drain()
        self._distributed.destroy_process_group()


def launched_processes() -> Processes:
    """The processes of `accelerate launch` or torchrun that this one is among, or this one alone.

    Raises:
        ImportError: there are several, and accelerate is not installed.
    """
    return LaunchedProcesses() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Processes()


def is_main_process() -> bool:
    """Whether this process has rank 0 according to the environment; needs no process group."""
    return int(os.environ.get("RANK", 0)) == 0

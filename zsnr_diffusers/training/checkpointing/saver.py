"""Write checkpoints in a thread while training continues, each from a copy of the state."""

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...utils.distributed import Processes
from ...utils.host_memory import free_host_memory
from ..fsdp import full_tensor, gather_full_tensors
from .checkpoint import Tensors, write_checkpoint

_SHARE_OF_FREE_MEMORY = 0.8
"""Fraction of free memory for a copy of the state; previews and the loader need some too."""


class CheckpointSaver:
    """The checkpoints of a run: the main process writes them, one at a time, and informs the others.

    Errors of the thread are raised in all processes by the next `save` or `wait`.

    Args:
        processes: of the run.
        last: the newest valid checkpoint, or None.
        in_background: write in a thread. If the host has no memory for a copy of the state, training waits anyway.
    """

    def __init__(self, processes: Processes, last: Path | None, in_background: bool) -> None:
        self._processes, self._last, self._in_background = processes, last, in_background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the thread of this process has failed; does not wait."""
        return self._error is not None

    def save(
        self, folder: Path, step: int, tensors: Tensors, numbers: Mapping[str, Any], checkpoints_total_limit: int
    ) -> None:
        """Save a checkpoint, after the one that is being written; collective.

        Args:
            folder: of the run.
            step: number of optimizer steps.
            tensors: by file and name, sharded or not; they may change after this returns.
            numbers: to save, JSON-serializable.
            checkpoints_total_limit: number of newest checkpoints to keep.

        Raises:
            TrainingError: this or the previous one could not be written.
        """
        self.wait()
        with self._processes.sync_errors():
            background = self._processes.is_main and self._in_background and self._has_room(tensors)
            # All processes take part in gathering sharded tensors.
            kept = self._copy(tensors) if background else gather_full_tensors(tensors, self._processes.is_main)
            write = functools.partial(write_checkpoint, folder, step, kept, numbers, checkpoints_total_limit)
            if background:
                # A daemon, so that it does not keep the process alive.
                self._thread = threading.Thread(target=self._write, args=(write,), name="checkpoint", daemon=True)
                self._thread.start()
            elif self._processes.is_main:
                self._last = write()

    def wait(self) -> None:
        """Wait until nothing is being written; collective.

        Raises:
            TrainingError: the last checkpoint could not be written.
        """
        self._last = self._processes.run_on_main(self._finish)

    def settle(self) -> None:
        """Wait in this process only, ignoring errors; for a run that ends with an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def describe_last(self) -> str:
        """Description of the newest valid checkpoint for messages, after waiting for the current one.

        Processes that write none know it since the last `save` or `wait`.
        """
        self.settle()
        failed = f" ({self._error})" if self._error else ""
        return (f"the last good checkpoint is {self._last}" if self._last else "there is no checkpoint yet") + failed

    def _finish(self) -> Path | None:
        """Wait for the thread and raise its error; returns the newest valid checkpoint."""
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._last

    def _write(self, write: Callable[[], Path]) -> None:
        """Write in the thread, and store the result."""
        try:
            self._last = write()
        except Exception as error:  # any error must be reported to the run
            self._error = error

    def _has_room(self, tensors: Tensors) -> bool:
        """Whether the host has memory for copies of these tensors, or has allocated them already."""
        if self._copies:
            return True
        size = sum(value.numel() * value.element_size() for values in tensors.values() for value in values.values())
        free = free_host_memory()
        if size > _SHARE_OF_FREE_MEMORY * free:
            tqdm.write(
                f"Checkpoints of {size / 1e9:,.1f} GB are written while training waits: the host has "
                f"{free / 1e9:,.1f} GB of free memory, too little for a copy of the state."
            )
            self._in_background = False
            return False
        return True

    def _copy(self, tensors: Tensors) -> Tensors:
        """Copies of full tensors in host memory, which the next ones overwrite."""
        found: dict[str, dict[str, Tensor]] = {}
        for file, values in tensors.items():
            found[file] = {}
            for name, value in values.items():
                whole = full_tensor(value.detach())
                copy = self._copies.get((file, name))
                if copy is None:
                    copy = self._copies[file, name] = torch.empty(whole.shape, dtype=whole.dtype)
                found[file][name] = copy.copy_(whole)
        return found

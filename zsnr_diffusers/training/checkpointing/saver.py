"""Checkpoints that are written by a thread while training goes on, each from a copy of the state."""

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
"""That a copy of the state may take; previews and the loader need some, too."""


class CheckpointSaver:
    """The checkpoints of a run: the main process writes them, one at a time, and all know of them.

    What goes wrong in the thread is raised in all processes by the next `save` or `wait`.

    Args:
        processes: of the run.
        last: the newest whole checkpoint, None if there is none.
        in_background: let a thread write. Where the host has no memory for a copy of the state, it is written at
            once anyway.
    """

    def __init__(self, processes: Processes, last: Path | None, in_background: bool) -> None:
        self._processes, self._last, self._in_background = processes, last, in_background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the thread of this process has failed; waits for nobody."""
        return self._error is not None

    def save(
        self, folder: Path, step: int, tensors: Tensors, numbers: Mapping[str, Any], checkpoints_total_limit: int
    ) -> None:
        """Save a checkpoint, after the one that is being written; collective.

        Args:
            folder: of the run.
            step: optimizer steps made.
            tensors: by file and name, sharded or not; they may change once this returns.
            numbers: to keep, as JSON can express them.
            checkpoints_total_limit: checkpoints to leave, the newest.

        Raises:
            TrainingError: this or the one before could not be written.
        """
        self.wait()
        with self._processes.sync_errors():
            background = self._processes.is_main and self._in_background and self._has_room(tensors)
            # Whatever the main process does with them, all take part in putting sharded ones together.
            kept = self._copy(tensors) if background else gather_full_tensors(tensors, self._processes.is_main)
            write = functools.partial(write_checkpoint, folder, step, kept, numbers, checkpoints_total_limit)
            if background:
                # Not one that keeps the process alive when it is to end at once.
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
        """Wait in this process alone, whatever comes of it; for a run that ends by an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def describe_last(self) -> str:
        """The newest whole checkpoint in words, for messages, once this process is writing no other.

        Processes that write none know of it since the last `save` or `wait`.
        """
        self.settle()
        failed = f" ({self._error})" if self._error else ""
        return (f"the last good checkpoint is {self._last}" if self._last else "there was no checkpoint yet") + failed

    def _finish(self) -> Path | None:
        """Wait for the thread and raise what it met; the newest whole checkpoint."""
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._last

    def _write(self, write: Callable[[], Path]) -> None:
        """Write in the thread, and keep what comes of it."""
        try:
            self._last = write()
        except Exception as error:  # whatever it is, the run has to hear of it
            self._error = error

    def _has_room(self, tensors: Tensors) -> bool:
        """Whether the host has memory for copies of these tensors, or holds some already."""
        if self._copies:
            return True
        size = sum(value.numel() * value.element_size() for values in tensors.values() for value in values.values())
        free = free_host_memory()
        if size > _SHARE_OF_FREE_MEMORY * free:
            tqdm.write(
                f"Checkpoints of {size / 1e9:,.1f} GB are written while training waits: the host has "
                f"{free / 1e9:,.1f} GB of memory free, too little for a copy of the state."
            )
            self._in_background = False
            return False
        return True

    def _copy(self, tensors: Tensors) -> Tensors:
        """Copies of full tensors in the host's memory, which the next ones will overwrite."""
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

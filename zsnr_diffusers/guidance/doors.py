"""Two doors of a pipeline's parts, hung for one call: what a denoiser returns, and a method that is replaced.

Nothing stays behind on denoiser or scheduler, and threads that share them do not see each other.
"""

import copy
import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn


class Run(Protocol):
    """One call of a pipeline, as its doors know it."""

    stack: ExitStack

    def note(self, output: Any) -> None:
        """Keep what a denoiser returned."""


active_run: "ContextVar[Run | None]" = ContextVar("guidance_interceptor", default=None)


def watch_denoiser(denoiser: nn.Module, run: Run) -> None:
    """Until the run's stack closes, it notes what the denoiser returns."""
    if getattr(denoiser, "_compiled_call_impl", None) is not None:
        # `module.compile()` would trace a hook into the graph, and compile anew for every call of the pipeline.
        open_door(denoiser, "_compiled_call_impl", _through_denoiser, run)
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if active_run.get() is run:
            run.note(output)

    run.stack.callback(denoiser.register_forward_hook(hook).remove)


def _through_denoiser(run: Run, denoiser: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    output = call(*args, **kwargs)
    run.note(output)
    return output


class _Door:
    """A method that is replaced on an object while runs use it: theirs go `through(run, owner, method, args, kwargs)`.

    Runs in several threads may share an owner, and then share its door: who comes first hangs it, who goes last takes
    it away.
    """

    def __init__(self, owner: Any, name: str, through: Callable[..., Any], method: Callable[..., Any]) -> None:
        self.owner, self.name, self.through, self.method = owner, name, through, method
        self.found = vars(owner).get(name)
        self.runs: list[Run] = []
        functools.update_wrapper(self, method)  # pipelines ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = active_run.get()
        if run in self.runs:
            return self.through(run, self.owner, self.method, args, kwargs)
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Door":
        """Some pipelines copy their scheduler in the middle; the copy has a door of its own, for the same runs."""
        owner = memo.get(id(self.owner))
        if owner is None:  # only the owner's attributes are copied, to be given back to it
            return self
        door = _Door(owner, self.name, self.through, copy.deepcopy(self.method, memo))
        for run in self.runs:
            _enter(door, run)
        return door


_doors: dict[tuple[int, str], _Door] = {}
_lock = threading.RLock()


def open_door(owner: Any, name: str, through: Callable[..., Any], run: Run) -> None:
    """Let a run through a method of an object in its own way, until its stack closes."""
    with _lock:
        door = _doors.get((id(owner), name))
        if door is None:
            door = _Door(owner, name, through, getattr(owner, name))
            setattr(owner, name, door)
        _enter(door, run)


def _enter(door: _Door, run: Run) -> None:
    """Let a run through a door until its stack closes; who is the last takes the door away."""

    def leave() -> None:
        with _lock:
            door.runs.remove(run)
            if door.runs:
                return
            del _doors[id(door.owner), door.name]
            if vars(door.owner).get(door.name) is door:
                if door.found is None:
                    delattr(door.owner, door.name)
                else:
                    setattr(door.owner, door.name, door.found)

    with _lock:
        _doors[id(door.owner), door.name] = door
        door.runs.append(run)
    run.stack.callback(leave)

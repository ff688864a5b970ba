"""Two ways to intercept a pipeline's call: a hook on its denoiser's output, and a patched method.

Both are removed after the call, and threads that share a denoiser or scheduler do not affect each other.
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
    """One call of a pipeline, as seen by hooks and patches."""

    stack: ExitStack

    def record(self, output: Any) -> None:
        """Store a denoiser's output."""


active_run: "ContextVar[Run | None]" = ContextVar("guidance_interceptor", default=None)


def watch_denoiser(denoiser: nn.Module, run: Run) -> None:
    """Have a run record a denoiser's outputs until its stack closes."""
    if getattr(denoiser, "_compiled_call_impl", None) is not None:
        # `module.compile()` would trace a hook into the graph, and recompile for every call of the pipeline.
        patch_method(denoiser, "_compiled_call_impl", _call_and_record, run)
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if active_run.get() is run:
            run.record(output)

    run.stack.callback(denoiser.register_forward_hook(hook).remove)


def _call_and_record(run: Run, denoiser: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a compiled denoiser and record its output in the run."""
    output = call(*args, **kwargs)
    run.record(output)
    return output


class PatchedMethod:
    """A patched method of an object, active while runs use it: their calls become `through(run, owner, method, args,
    kwargs)`.

    Runs in several threads may share an owner and its patch: the first run sets it, the last one removes it.
    """

    def __init__(self, owner: Any, name: str, through: Callable[..., Any], method: Callable[..., Any]) -> None:
        self.owner, self.name, self.through, self.method = owner, name, through, method
        self.found = vars(owner).get(name)
        self.runs: list[Run] = []
        functools.update_wrapper(self, method)  # pipelines inspect its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method; inside a guided call, intercepted."""
        run = active_run.get()
        if run in self.runs:
            return self.through(run, self.owner, self.method, args, kwargs)
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchedMethod":
        """Some pipelines copy their scheduler during a call; the copy gets its own patch, for the same runs."""
        owner = memo.get(id(self.owner))
        if owner is None:  # only the owner's attributes are copied, and restored later
            return self
        patch = PatchedMethod(owner, self.name, self.through, copy.deepcopy(self.method, memo))
        for run in self.runs:
            _add_run(patch, run)
        return patch


_patches: dict[tuple[int, str], PatchedMethod] = {}
_lock = threading.RLock()


def patch_method(owner: Any, name: str, through: Callable[..., Any], run: Run) -> None:
    """Route a run's calls of an object's method through `through`, until the run's stack closes."""
    with _lock:
        patch = _patches.get((id(owner), name))
        if patch is None:
            patch = PatchedMethod(owner, name, through, getattr(owner, name))
            setattr(owner, name, patch)
        _add_run(patch, run)


def _add_run(patch: PatchedMethod, run: Run) -> None:
    """Let a patched method apply to a run until its stack closes; the last run removes the patch."""

    def leave() -> None:
        with _lock:
            patch.runs.remove(run)
            if patch.runs:
                return
            del _patches[id(patch.owner), patch.name]
            if vars(patch.owner).get(patch.name) is patch:
                if patch.found is None:
                    delattr(patch.owner, patch.name)
                else:
                    setattr(patch.owner, patch.name, patch.found)

    with _lock:
        _patches[id(patch.owner), patch.name] = patch
        patch.runs.append(run)
    run.stack.callback(leave)

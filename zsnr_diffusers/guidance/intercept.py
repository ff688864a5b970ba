"""One call of a pipeline, watched at two doors: what its denoiser predicts, and what it hands to `scheduler.step`.

Pipelines stack, split and combine predictions each in a way of its own. All of them call a denoiser once per step and
then a scheduler, so how a pipeline guides can be read off the two: its guided prediction is a weighted sum of the
denoiser's, and the one with the largest weight is the conditional one. What is found decides what is rescaled; where
nothing is found, nothing is changed.

Nothing stays behind on denoiser or scheduler, and threads that share them do not see each other.
"""

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from torch import Tensor, nn

from ..core import NoiseLevel, noise_level
from ..core.flow import flow_level
from ..core.guidance import guidance_weights, rescale_guidance, rescale_guidance_in_space
from ..core.noise import noise_level_of_ratio

logger = logging.get_logger(__name__)

_active: "ContextVar[GuidanceInterceptor | None]" = ContextVar("guidance_interceptor", default=None)
_said: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()

OFF = "its denoiser makes one prediction per sample; guidance is off, as it is at a guidance scale of 1 or less"
SEPARATE = "it calls its denoiser several times for a step, and only what one call returns can be told apart"
NO_STEP = "its denoiser and scheduler.step never met; its sampling loop is of another kind"
UNKNOWN = (
    "what it hands to scheduler.step is not a weighted sum of what its denoiser predicted in one call, so which "
    "prediction is the conditional one cannot be told"
)
THREE_WAY = "it combines {} predictions, and a guider knows a conditional and an unconditional one"


class GuidanceError(RuntimeError):
    """A pipeline guides in a way that cannot be acted on, and `strict=True` asked for an error."""


@dataclass
class GuidanceSettings:
    """What is done to a pipeline's guidance; see `enable_guidance_rescale`."""

    guidance_rescale: float = 0.0
    space: str = "output"
    guider: Any = None
    strict: bool = False


@dataclass(frozen=True)
class BatchLayout:
    """How a denoiser's batch holds the predictions that a pipeline combines."""

    copies: int
    interleaved: bool
    conditional: int = 0

    def part(self, stacked: Tensor, index: int, guided: Tensor) -> Tensor:
        """One of the predictions in `stacked`, in the shape that the scheduler sees.

        Channels beyond those (a predicted variance) are left out. Some pipelines for video hand frames to the
        scheduler as a batch.
        """
        size = len(stacked) // self.copies
        part = stacked[index :: self.copies] if self.interleaved else stacked.narrow(0, index * size, size)
        if part.shape == guided.shape:
            return part
        if part.ndim == 5 and guided.ndim == 4:
            part = part.transpose(1, 2).flatten(0, 1)
        return part[:, : guided.shape[1]]


class GuidanceInterceptor:
    """A context in which the calls of a pipeline's denoisers are noted, and acted on at its schedulers' `step`."""

    def __init__(self, pipe: Any, settings: GuidanceSettings) -> None:
        self._pipe, self._settings = pipe, settings
        self._schedulers = [part for part in vars(pipe).values() if isinstance(part, SchedulerMixin)]
        if settings.guidance_rescale > 0 and settings.space != "output":
            for scheduler in self._schedulers:
                _check_levels(scheduler)
        self._predicted: Tensor | None = None
        self._stacking: BatchLayout | None = None
        self._shapes: Any = None
        self._timestep: Any = None
        self._step = -1
        self._calls = 0  # of denoisers, since the scheduler was last called
        self._settled = False
        self.stack = ExitStack()

    def __enter__(self) -> "GuidanceInterceptor":
        token = _active.set(self)
        self.stack.callback(_active.reset, token)
        try:
            for denoiser in denoisers(self._pipe):
                _watch_denoiser(denoiser, self, self.stack)
            for scheduler in self._schedulers:
                _open_door(scheduler, "step", GuidanceInterceptor.through_scheduler, self, self.stack)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stack.close()
        if error is None and not self._settled and not getattr(self._pipe, "interrupt", False):
            self._cannot(NO_STEP if self._step < 0 else OFF)

    def note(self, output: Any) -> None:
        """Keep what a denoiser returned until the scheduler is called."""
        self._calls = 1 if self._predicted is None else self._calls + 1
        self._predicted = output if isinstance(output, Tensor) else output[0]

    def through_denoiser(self, denoiser: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a denoiser and note what it returns."""
        output = call(*args, **kwargs)
        self.note(output)
        return output

    def through_scheduler(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a scheduler's step on the prediction to go on with."""
        stacked, self._predicted = self._predicted, None
        # The first three parameters in every scheduler of diffusers
        output, timestep, sample = args[:3] if len(args) > 2 else _first_three(args, kwargs)
        if stacked is None or output is None or sample is None:
            return step(*args, **kwargs)
        self._count(timestep)
        # A UNet that predicts a variance too returns it beside the mean, in as many channels again.
        learned = output.shape[1] == 2 * sample.shape[1]
        guided, variance = output.split(sample.shape[1], dim=1) if learned else (output, None)
        changed = self._guide(stacked, guided, sample, timestep, scheduler)
        if changed is None:
            return step(*args, **kwargs)
        self._settled = True
        changed = changed if variance is None else torch.cat([changed, variance], dim=1)
        return step(changed, *args[1:], **kwargs) if args else step(**{**kwargs, "model_output": changed})

    def _count(self, timestep: Any) -> None:
        """Count steps; a pipeline that steps several views at a timestep passes the same object for each."""
        self._step += self._step < 0 or timestep is not self._timestep
        self._timestep = timestep

    def _guide(self, stacked: Tensor, guided: Tensor, sample: Tensor, timestep: Any, scheduler: Any) -> Tensor | None:
        """The prediction to go on with; None to go on with the pipeline's own."""
        frames = stacked.shape[2] if stacked.ndim == 5 and guided.ndim == 4 else 1
        stacking = self._find(stacked, guided, sample, frames)
        if stacking is None:
            return None
        conditional = stacking.part(stacked, stacking.conditional, guided)
        settings = self._settings
        if settings.guider is not None:
            if stacking.copies != 2:
                self._cannot(THREE_WAY.format(stacking.copies))
                return None
            unconditional = stacking.part(stacked, 1 - stacking.conditional, guided)
            guided = self._by_guider(conditional, unconditional, timestep, scheduler)
        if frames > 1:  # a video's spread is that of all its frames
            video = (-1, frames, *guided.shape[1:])
            guided, conditional, sample = (x.reshape(video) for x in (guided, conditional, sample))
        rescaled = self._rescale(guided, conditional, sample, timestep, scheduler)
        return rescaled.flatten(0, 1) if frames > 1 else rescaled

    def _find(self, stacked: Tensor, guided: Tensor, sample: Tensor, frames: int) -> BatchLayout | None:
        """How this step's predictions are stacked; found out anew whenever shapes change."""
        if self._stacking is not None and self._shapes == (stacked.shape, guided.shape):
            return self._stacking
        copies, rest = divmod(len(stacked) * frames, len(guided))
        if rest or copies == 1:
            if not self._settled:  # a callback may well switch guidance off later on
                self._cannot(OFF if self._calls == 1 else SEPARATE)
            return None
        for interleaved in (False, True):
            stacking = BatchLayout(copies, interleaved)
            predictions = [stacking.part(stacked, index, guided) for index in range(copies)]
            if any(prediction.shape != guided.shape for prediction in predictions):
                break
            # In single precision, predictions that were mixed with the sample are told by their residual alone.
            coarse = guided.dtype.itemsize < 4
            found = guidance_weights(guided, predictions, sample if coarse else None)
            if found is None:  # equal predictions: no matter which is which, and nothing to learn from
                self._settled = True
                return stacking if self._settings.guider is not None else None
            weights, explained = found
            if explained:
                self._shapes = stacked.shape, guided.shape
                self._stacking = replace(stacking, conditional=weights.index(max(weights)))
                return self._stacking
        self._cannot(UNKNOWN if self._calls == 1 else SEPARATE)
        return None

    def _rescale(self, guided: Tensor, conditional: Tensor, sample: Tensor, timestep: Any, scheduler: Any) -> Tensor:
        settings = self._settings
        if settings.guidance_rescale == 0 or settings.space == "output":
            return rescale_guidance(guided, conditional, settings.guidance_rescale)
        return rescale_guidance_in_space(
            guided,
            conditional,
            settings.guidance_rescale,
            space=settings.space,
            prediction_type=_predicted(scheduler),
            x_t=scheduler.scale_model_input(sample, timestep),
            level=level_at(scheduler, timestep),
        )

    def _by_guider(self, conditional: Tensor, unconditional: Tensor, timestep: Any, scheduler: Any) -> Tensor:
        guider = self._settings.guider
        steps = getattr(self._pipe, "_num_timesteps", None) or len(scheduler.timesteps)
        guider.set_state(step=self._step, num_inference_steps=steps, timestep=timestep)
        # The name of the method that takes a state and the names of its fields differs between versions of diffusers.
        prepare = getattr(guider, "prepare_inputs_from_block_state", guider.prepare_inputs)
        state = SimpleNamespace(conditional=conditional, unconditional=unconditional)
        guided: Tensor = guider(prepare(state, {"noise_pred": ("conditional", "unconditional")}))[0]
        return guided

    def _cannot(self, reason: str) -> None:
        """Say once why a pipeline's guidance is left as it is.

        Raises:
            GuidanceError: if that was asked for.
        """
        message = f"{type(self._pipe).__name__} is left to guide as it does: {reason}."
        if self._settings.strict:
            raise GuidanceError(message)
        self._settled = True
        warn_once(self._pipe, message)


def warn_once(pipe: Any, message: str) -> None:
    """Warn, once for each pipeline."""
    said = _said.setdefault(pipe, set())
    if message not in said:
        said.add(message)
        logger.warning(message)


def _first_three(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    given = {**kwargs, **dict(zip(("model_output", "timestep", "sample"), args, strict=False))}
    return given.get("model_output"), given.get("timestep"), given.get("sample")


def denoisers(pipe: Any) -> list[nn.Module]:
    """The UNets among a pipeline's components, compiled or not."""
    return [
        part
        for name, part in vars(pipe).items()
        if isinstance(part, nn.Module)
        and (name == "unet" or "UNet" in type(getattr(part, "_orig_mod", part)).__name__)
    ]


def level_at(scheduler: Any, timestep: Any) -> NoiseLevel:
    """Noise level at a timestep of a scheduler of diffusers or of ours, of betas or of flow matching."""
    if not hasattr(scheduler, "sigmas"):
        # Stock moves its table along with what it noises, and not every device has float64.
        return noise_level(scheduler.alphas_cumprod.cpu().double(), int(timestep))
    index = scheduler.step_index
    sigma = float(scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index])
    return flow_level(sigma) if _in_flow_time(scheduler) else noise_level_of_ratio(sigma)


def _in_flow_time(scheduler: Any) -> bool:
    """Whether `sigmas` are flow times: stock's flow schedulers name their noising after them, others have a switch."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def _predicted(scheduler: Any) -> str:
    """What the network predicts; stock's flow schedulers know one thing and do not say it."""
    return str(scheduler.config.get("prediction_type", "flow_prediction"))


def _check_levels(scheduler: Any) -> None:
    if not (_in_flow_time(scheduler) or hasattr(scheduler, "alphas_cumprod")) or scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has a schedule whose noise levels are not known here, so guidance can be "
            "rescaled on its network's output alone; leave out space."
        )


def _watch_denoiser(denoiser: nn.Module, run: GuidanceInterceptor, stack: ExitStack) -> None:
    """Until the stack closes, `run` notes what the denoiser returns."""
    if getattr(denoiser, "_compiled_call_impl", None) is not None:
        # `module.compile()` would trace a hook into the graph, and compile anew for every call of the pipeline.
        _open_door(denoiser, "_compiled_call_impl", GuidanceInterceptor.through_denoiser, run, stack)
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if _active.get() is run:
            run.note(output)

    stack.callback(denoiser.register_forward_hook(hook).remove)


class _Door:
    """A method that is replaced on an object while runs use it: theirs go `through(run, owner, method, args, kwargs)`.

    Runs in several threads may share an owner, and then share its door: who comes first hangs it, who goes last takes
    it away.
    """

    def __init__(self, owner: Any, name: str, through: Callable[..., Any], method: Callable[..., Any]) -> None:
        self.owner, self.name, self.through, self.method = owner, name, through, method
        self.found = vars(owner).get(name)
        self.runs: list[GuidanceInterceptor] = []
        functools.update_wrapper(self, method)  # pipelines ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _active.get()
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
            _enter(door, run, run.stack)
        return door


_doors: dict[tuple[int, str], _Door] = {}
_lock = threading.RLock()


def _open_door(owner: Any, name: str, through: Callable[..., Any], run: GuidanceInterceptor, stack: ExitStack) -> None:
    with _lock:
        door = _doors.get((id(owner), name))
        if door is None:
            door = _Door(owner, name, through, getattr(owner, name))
            setattr(owner, name, door)
        _enter(door, run, stack)


def _enter(door: _Door, run: GuidanceInterceptor, stack: ExitStack) -> None:
    """Let a run through a door until the stack closes; who is the last takes the door away."""

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
    stack.callback(leave)

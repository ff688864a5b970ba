"""Intercepts one call of a pipeline at two points: its denoiser's predictions, and the input of `scheduler.step`.

Every pipeline stacks, splits and combines predictions in its own way. But all of them call denoisers once or more per
step and then a scheduler, so their guidance can be inferred from the two: the guided prediction is a weighted sum of
the denoisers' predictions, and the one with the largest weight is the conditional one. If no such combination is
found, nothing is changed.
"""

import copy
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from torch import Tensor, cat

from ..core.combination import Combination, find_combination, find_combination_of_equals, guidance_weights
from ..core.guidance import rescale_guidance
from ..core.low_frequencies import keep_low_frequencies, no_height_and_width
from .layout import (
    Layout,
    find_denoisers,
    frames_per_sample,
    has_channels_last,
    output_tensors,
    possible_layouts,
)
from .levels import check_scheduler_levels, rescale_in_space
from .method_patch import active_run, patch_method, watch_denoiser

logger = logging.get_logger(__name__)

_said: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()

OFF = (
    "its denoiser makes one prediction per sample, so guidance is off (guidance scale of 1 or less), or the scale is "
    "an input of the network"
)
NO_STEP = "no scheduler.step call uses the denoiser output, so its sampling loop is not supported"
UNKNOWN = (
    "the input of scheduler.step is not a weighted sum of the denoiser's predictions, so the conditional prediction "
    "cannot be identified"
)
MANY = "it combines {} predictions, but a guider needs one conditional and one unconditional prediction"

_MOST_CALLS = 8
"""Maximum number of stored denoiser outputs per step; a pipeline without scheduler steps would fill the memory."""


class GuidanceError(RuntimeError):
    """Guidance rescale does not apply to a pipeline, and `strict=True` was passed."""


@dataclass
class GuidanceSettings:
    """Settings of a pipeline's guidance; see `enable_guidance_rescale`."""

    guidance_rescale: float = 0.0
    space: str = "output"
    guider: Any = None
    strict: bool = False
    keep_low_frequencies: int = 0


class GuidanceInterceptor:
    """A context that records the calls of a pipeline's denoisers, and changes the input of its schedulers' `step`."""

    def __init__(self, pipe: Any, settings: GuidanceSettings) -> None:
        self._pipe, self._settings = pipe, settings
        self._schedulers = [part for part in vars(pipe).values() if isinstance(part, SchedulerMixin)]
        if settings.guidance_rescale > 0 and settings.space != "output":
            for scheduler in self._schedulers:
                check_scheduler_levels(scheduler)
        self._noted: deque[tuple[Tensor, ...]] = deque(maxlen=_MOST_CALLS)
        self._place = 0  # index of a scheduler's step since the denoisers' last call
        self._found: dict[Any, tuple[Layout, Combination]] = {}
        self._guiders = {0: settings.guider}
        self._timestep: Any = None
        self._step = -1
        self._settled = False
        self._channels_last = any(map(has_channels_last, find_denoisers(pipe)))
        self.stack = ExitStack()

    def __enter__(self) -> "GuidanceInterceptor":
        token = active_run.set(self)
        self.stack.callback(active_run.reset, token)
        try:
            for denoiser in find_denoisers(self._pipe):
                watch_denoiser(denoiser, self)
            for scheduler in self._schedulers:
                patch_method(scheduler, "step", GuidanceInterceptor.on_scheduler_step, self)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stack.close()
        if error is None and not self._settled and not getattr(self._pipe, "interrupt", False):
            self._give_up(NO_STEP if self._step < 0 else OFF)

    def record(self, output: Any) -> None:
        """Store a denoiser's output until the scheduler is called."""
        if self._place > 0:
            self._noted.clear()
            self._place = 0
        self._noted.append(output_tensors(output))

    def _take_outputs(self) -> list[Tensor]:
        """The denoisers' outputs for this scheduler step; networks for video with sound return one tensor for each."""
        place, self._place = self._place, self._place + 1
        taken = [output[place] for output in self._noted if len(output) > place]
        if not any(len(output) > place + 1 for output in self._noted):
            self._noted.clear()
        return taken

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a scheduler's `step` with the prediction according to the guidance settings."""
        outputs = self._take_outputs()
        # The first three parameters in every scheduler of diffusers
        output, timestep, sample = args[:3] if len(args) > 2 else _step_arguments(args, kwargs)
        if not outputs or output is None or sample is None:
            return step(*args, **kwargs)
        self._count_step(timestep)
        # A UNet that also predicts a variance returns it after the mean, in the same number of channels.
        learned = output.shape[1] == 2 * sample.shape[1]
        guided, variance = output.split(sample.shape[1], dim=1) if learned else (output, None)
        changed = self._guide(outputs, guided, sample, timestep, scheduler)
        if changed is None:
            return step(*args, **kwargs)
        self._settled = True
        changed = changed if variance is None else cat([changed, variance], dim=1)
        return step(changed, *args[1:], **kwargs) if args else step(**{**kwargs, "model_output": changed})

    def _count_step(self, timestep: Any) -> None:
        """Count steps; a pipeline with several views per timestep passes the same timestep object for each."""
        self._step += self._step < 0 or timestep is not self._timestep
        self._timestep = timestep

    def _guide(
        self, outputs: list[Tensor], guided: Tensor, sample: Tensor, timestep: Any, scheduler: Any
    ) -> Tensor | None:
        """The prediction for a scheduler step, according to the settings; None to keep the pipeline's own."""
        found = self._find_combination(outputs, guided, sample)
        if found is None:
            return None
        layout, how = found
        predictions = layout.predictions(outputs, guided.shape)
        conditional = how.apply_to(predictions[how.conditional], sample)
        if self._settings.guider is not None:
            if len(predictions) != 2:  # also if one has no weight yet: safety guidance begins after some steps
                self._give_up(MANY.format(len(predictions)))
                return None
            unconditional = predictions[1 - how.conditional]
            combined = self._apply_guider(predictions[how.conditional], unconditional, timestep, scheduler)
            guided = how.apply_to(combined, sample)
        number = frames_per_sample(outputs[-1], guided.shape)
        if number > 1:  # a video's standard deviation is over all its frames
            video = (-1, number, *guided.shape[1:])
            guided, conditional, sample = (x.reshape(video) for x in (guided, conditional, sample))
        rescaled = self._rescale(guided, conditional, sample, timestep, scheduler)
        # Last, so that the rescale, which also multiplies brightness, does not change the kept frequencies.
        kept = self._keep_low_frequencies(rescaled, conditional)
        return kept.flatten(0, 1) if number > 1 else kept

    def _find_combination(
        self, outputs: list[Tensor], guided: Tensor, sample: Tensor
    ) -> tuple[Layout, Combination] | None:
        """Layout and guidance combination of this step's predictions, determined once per shape; or None."""
        shapes = (*(output.shape for output in outputs), guided.shape)
        if shapes in self._found:
            layout, known = self._found[shapes]
            predictions = layout.predictions(outputs, guided.shape)
            now = known if known.of_sample == 0 else known.refit(guided, predictions, sample)
            return None if now is None else (layout, now)
        possible = [*possible_layouts(outputs, guided.shape)]
        if not possible:
            if not self._settled:  # a callback may disable guidance later
                self._give_up(OFF if len(outputs) == 1 else UNKNOWN)
            return None
        for layout in possible:
            predictions = layout.predictions(outputs, guided.shape)
            if not predictions:
                continue
            if guidance_weights(guided, predictions) is None:  # equal, so their order does not matter
                how = find_combination_of_equals(guided, predictions[0])
                if how is None:  # they are equal in another part of the outputs
                    continue
                self._settled = True
                return None if self._settings.guider is None else (layout, how)
            combination = find_combination(guided, predictions, sample)
            if combination is not None:
                self._found[shapes] = layout, combination
                return layout, combination
        if bool(guided.any()):  # otherwise the pipeline generates a video without sound
            self._give_up(UNKNOWN)
        return None

    def _rescale(self, guided: Tensor, conditional: Tensor, sample: Tensor, timestep: Any, scheduler: Any) -> Tensor:
        """Rescale a guided prediction in the space of the settings."""
        settings = self._settings
        if settings.guidance_rescale == 0 or settings.space == "output":
            return rescale_guidance(guided, conditional, settings.guidance_rescale)
        return rescale_in_space(
            guided, conditional, settings.guidance_rescale, settings.space, sample, timestep, scheduler
        )

    def _keep_low_frequencies(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Keep the conditional prediction's low frequencies; sound generated with a video has none."""
        k = self._settings.keep_low_frequencies
        if k == 0 or (guided.ndim < 4 and self._place > 1):
            return guided
        if guided.ndim > 5:  # rows of patches, with a patch's height and width
            raise ValueError(no_height_and_width(k, guided.shape))
        if self._channels_last and guided.ndim == 5:
            guided, conditional = guided.movedim(-1, -3), conditional.movedim(-1, -3)
            return keep_low_frequencies(guided, conditional, k).movedim(-3, -1)
        return keep_low_frequencies(guided, conditional, k)

    def _apply_guider(self, conditional: Tensor, unconditional: Tensor, timestep: Any, scheduler: Any) -> Tensor:
        """Combine two predictions with the guider of the settings."""
        guider = self._current_guider()
        steps = getattr(self._pipe, "_num_timesteps", None) or len(scheduler.timesteps)
        guider.set_state(step=self._step, num_inference_steps=steps, timestep=timestep)
        # This method and its field names differ between versions of diffusers.
        prepare = getattr(guider, "prepare_inputs_from_block_state", guider.prepare_inputs)
        state = SimpleNamespace(conditional=conditional, unconditional=unconditional)
        guided: Tensor = guider(prepare(state, {"noise_pred": ("conditional", "unconditional")}))[0]
        return guided

    def _current_guider(self) -> Any:
        """The guider for this scheduler's data: guiders store predictions, and sound and video differ in shape."""
        place = self._place - 1
        if place not in self._guiders:
            self._guiders[place] = copy.deepcopy(self._guiders[0])
        return self._guiders[place]

    def _give_up(self, reason: str) -> None:
        """Warn once why a pipeline's guidance is unchanged, or raise in strict mode.

        Raises:
            GuidanceError: in strict mode.
        """
        message = f"{type(self._pipe).__name__}: guidance settings were not applied: {reason}."
        if self._settings.strict:
            raise GuidanceError(message)
        self._settled = True
        warn_once(self._pipe, message)


def warn_once(pipe: Any, message: str) -> None:
    """Log a warning, each message once per pipeline."""
    said = _said.setdefault(pipe, set())
    if message not in said:
        said.add(message)
        logger.warning(message)


def _step_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(model_output, timestep, sample) from the arguments of a call of `scheduler.step`."""
    given = {**kwargs, **dict(zip(("model_output", "timestep", "sample"), args, strict=False))}
    return given.get("model_output"), given.get("timestep"), given.get("sample")

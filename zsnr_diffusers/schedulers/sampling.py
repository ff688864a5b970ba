"""Base class of all schedulers: one run of a sampler over a path of noise levels.

It contains no formulas and no schedule: levels come from the scheduler, updates from `zsnr_diffusers.core`. It handles
the config, which survives saving and conversion, and timesteps, devices, dtypes and generators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core import NoiseLevel, Update, x_0_factors
from ..core.safeguard import Safeguard, output_projection, safeguarded_gains
from .config import DEFAULTS, SchedulerConfig


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a step computes for samples of `dtype`: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, skipped if unnecessary, since even a no-op takes as long as a small addition."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def subclass_names(cls: type[Any]) -> set[str]:
    """Names of all direct and indirect subclasses of a class."""
    return {name for sub in cls.__subclasses__() for name in (sub.__name__, *subclass_names(sub))}


class PathSampler(SchedulerMixin, ConfigMixin):
    """Steps over `self._path`, each identified by its timestep. Subclasses choose the path and the updates."""

    timesteps: Tensor
    num_inference_steps: int | None = None
    order = 1
    init_noise_sigma = 1.0
    _eta: float = 0.0
    _memory = False  # whether a step uses the outputs of earlier steps
    _begin_index: int | None = None
    _internal_dict: SchedulerConfig  # diffusers' own name

    def register_to_config(self, **kwargs: Any) -> None:
        """Add to the config as in diffusers, but do not mark values as defaults that another class may replace."""
        super().register_to_config(**(kwargs | ({DEFAULTS: []} if DEFAULTS in kwargs else {})))
        self._internal_dict = SchedulerConfig(self._internal_dict)

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        """diffusers' schedulers that can be created here, without placeholders for missing packages."""
        return [each for each in super()._get_compatibles() if not isinstance(each, DummyObject)]

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`, as in diffusers.

        Raises:
            ValueError: the config was changed by attribute, which would not be saved.
        """
        self._check_config()
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_config(self) -> None:
        """Refuse a config changed by `scheduler.config.name = value`, which has no effect and is not saved."""
        pairs = ((key, value, getattr(self.config, key, value)) for key, value in self.config.items())
        # Compare as text: unpickled numbers are other objects, and arrays have no truth value.
        changed = [key for key, value, other in pairs if value is not other and repr(value) != repr(other)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} was assigned to the config of {type(self).__name__}, which has no effect; "
                f"create a new scheduler: {type(self).__name__}.from_config(scheduler.config, {changed[0]}=...)."
            )

    # -- the path

    def _set_path(
        self, timesteps: Sequence[float], path: Sequence[NoiseLevel], device: str | torch.device | None
    ) -> None:
        """Prepare sampling over these noise levels, which correspond to these timesteps of the network."""
        self.timesteps = torch.tensor(timesteps, device=device)
        self._index_of = {timestep: index for index, timestep in enumerate(timesteps)}
        self._path = [*path]
        self._x_0_factors = [x_0_factors(self.config["prediction_type"], level) for level in path]
        self._plans: dict[tuple[int, float], tuple[list[Update], list[Safeguard]]] = {}
        self._start, self._next = 0, 0
        self._outputs: list[Tensor] = []
        self._held: Tensor | None = None

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """The sampler's updates over these noise levels: what distinguishes one sampler from another."""
        raise NotImplementedError

    def _make_safeguards(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """The `Safeguard` of each update, which lets a step fall back to low order; none by default."""
        return []

    def _updates_from(self, start: int, eta: float) -> list[Update]:
        """Updates of a run that starts at index `start` of the path."""
        return self._plan_from(start, eta)[0]

    def _plan_from(self, start: int, eta: float) -> tuple[list[Update], list[Safeguard]]:
        """Updates and safeguards of a run that starts at index `start` of the path, created once for each `eta`."""
        if (start, eta) not in self._plans:
            path = self._path[start:]
            updates = self._make_updates(path, eta)
            self._plans[start, eta] = updates, self._make_safeguards(path, updates, eta)
        return self._plans[start, eta]

    def _path_index(self, timestep: int | float | Tensor) -> int:
        """Index of a timestep on the path, found without synchronizing with the device.

        Pipelines pass views of `self.timesteps`, whose storage offset is the index. A run may therefore start
        anywhere, and a step that does not follow the last one starts a new run.
        """
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            here, path = timestep.untyped_storage().data_ptr(), self.timesteps.untyped_storage().data_ptr()
            if timestep.numel() == 1 and here == path:
                return int(timestep.storage_offset())
        index = self._index_of.get(float(timestep))
        if index is None:
            raise ValueError(
                f"timestep {float(timestep):g} is not among the {len(self._index_of)} that set_timesteps set; pass "
                "one of scheduler.timesteps."
            )
        return index

    @property
    def begin_index(self) -> int | None:
        """Index at which a pipeline declared that it starts (image-to-image), or None."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Prepare the updates of a run from this index. Nothing else depends on it: each step determines its own
        index.

        An index after the last step means a run without steps, as with a strength of 0.
        """
        self._begin_index = begin_index
        if self._memory and begin_index < len(self._path):
            self._updates_from(begin_index, self._eta)

    # -- one step

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The unchanged sample: networks take samples at the path's own noise levels."""
        return sample

    def _step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: Tensor | None,
        return_dict: bool,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One sampling step with the path's updates; the `step` of every scheduler."""
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps(num_inference_steps) before step.")
        if variance_noise is not None and generator is not None:
            raise ValueError("Pass either generator or variance_noise, not both.")
        index = self._path_index(timestep)
        if self._memory and index != self._next:  # a new run, or a restart
            self._start, self._outputs, self._held = index, [], None
        updates, safeguards = self._plan_from(self._start, eta)
        update = updates[index - self._start]

        wide = compute_dtype(sample.dtype)
        x_t = to_dtype(sample, wide)
        x_0 = self._predict_x_0(to_dtype(model_output, wide), x_t, index)
        outputs = self._outputs = [x_0, *self._outputs[: len(update.gains) - 1]]
        x_s = x_t * update.keep
        if safeguards and len(outputs) > 1:
            gains = self._safeguarded_gains(outputs, safeguards[index - self._start])
            for gain_of_each, output in zip(gains, outputs, strict=True):
                x_s.addcmul_(output, gain_of_each)
        else:
            for gain, output in zip(update.gains, outputs, strict=True):
                x_s.add_(output, alpha=gain)
        if update.noise > 0:
            if variance_noise is None:  # in the sample's dtype, so that a seed gives the same noise as in diffusers
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            x_s.add_(to_dtype(variance_noise, wide), alpha=update.noise)
        elif len(outputs) > 1 and index + 1 == len(self._path):
            x_s = self._clip_x_0(x_s)
        self._next = index + 1
        if not self._memory or self._next == len(self._path):
            self._outputs = []
        prev_sample, pred_original_sample = to_dtype(x_s, sample.dtype), to_dtype(x_0, sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        if self._outputs:  # callers may modify the result, as previews do; pipelines request the tuple
            pred_original_sample = pred_original_sample.clone()
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _safeguarded_gains(self, outputs: Sequence[Tensor], safeguard: Safeguard) -> list[Tensor]:
        """Each sample's gains of the outputs, with reduced order where its outputs reverse."""
        held = output_projection(outputs[0], outputs[1])
        self._held = held if self._held is None else torch.minimum(held, self._held)
        return safeguarded_gains(self._held, safeguard)

    def _predict_x_0(self, model_output: Tensor, x_t: Tensor, index: int) -> Tensor:
        """x_0 from the network's output at index `index` of the path, clipped as configured."""
        a, b = self._x_0_factors[index]
        x_0 = (x_t * a).add_(model_output, alpha=float(b))
        return self._clip_x_0(x_0)

    def _clip_x_0(self, x_0: Tensor) -> Tensor:
        """A predicted x_0 clipped to the data's range, if the config gives one."""
        return x_0

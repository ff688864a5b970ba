"""Base class of schedulers for flow-matching models, with the interface of diffusers' flow pipelines.

Flow time s runs from 1, pure noise, to 0, clean data; `sigmas` are flow times, `timesteps` the network's inputs. It
contains no formulas: levels and spacings come from `zsnr_diffusers.core.flow`, the step from `sampling.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from ..core import NoiseLevel, add_noise
from ..core.choices import check_shift
from ..core.flow import (
    check_flow_times,
    dynamic_shift,
    euler_step,
    flow_level,
    is_stock_spacing,
    kappa_times,
    shifted_time,
    stretch_to_terminal,
    trailing_times,
    unshifted_time,
)
from ..core.predictions import x_0_factors
from .config import DEFAULTS, OWN_SPACING, flow_model_config, normalize_spacing, own_spacing
from .sampling import PathSampler, compute_dtype, subclass_names, to_dtype

logger = logging.get_logger(__name__)

FLOW_SPACINGS = ("kappa", "trailing")


class FlowMatchScheduler(PathSampler):
    """Base class: flow times, noising, config. Use one of its subclasses.

    Replaces `FlowMatchEulerDiscreteScheduler` and diffusers' other flow schedulers in any pipeline: `pipe.scheduler =
    FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)`.

    Args:
        num_train_timesteps: the network's timestep for flow time 1.
        shift: of the flow times with `trailing` (Esser et al. 2024, arXiv:2403.03206, eq. 23); `kappa` depends on the
            signal-to-noise ratio only and needs no shift.
        use_dynamic_shifting: `set_timesteps` takes the shift as `mu`, which pipelines compute from the image size.
        base_shift: for pipelines, which compute `mu` from this and the following three.
        max_shift: likewise.
        base_image_seq_len: likewise.
        max_image_seq_len: likewise.
        shift_terminal: the last flow time of `trailing` (LTX-Video).
        time_shift_type: of dynamic shifting, `exponential` or `linear`.
        invert_sigmas: the network's time runs from noise to data, and it predicts x_0 - noise (Mochi).
        stochastic_sampling: predict x_0, then add new noise for the next flow time, for distilled models.
        prediction_type: `flow_prediction`, noise - x_0, or another type that `zsnr_diffusers.core.x_0_factors`
            supports.
        timestep_spacing: `kappa` concentrates steps where the signal emerges; `trailing` uses shifted 1, (n - 1) / n,
            ..., 1 / n, the flow times of distilled models (schnell, turbo, lightning).

    Raises:
        ValueError: a shift of 0 or less, unknown names.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]  # noqa: RUF012  diffusers' form
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        invert_sigmas: bool = False,
        stochastic_sampling: bool = False,
        prediction_type: str = "flow_prediction",
        timestep_spacing: str = "kappa",
    ) -> None:
        self._set_up()

    def _set_up(self) -> None:
        """Check the config, which diffusers has filled when `__init__` runs, and set up all flow times."""
        self.register_to_config(**normalize_spacing(self.config), _class_name=type(self).__name__)
        config = self.config
        check_shift(config["shift"])
        dynamic_shift(1.0, config["time_shift_type"])
        x_0_factors(config["prediction_type"], flow_level(1.0))
        if (spacing := own_spacing(config)) not in FLOW_SPACINGS:
            raise ValueError(
                f"timestep_spacing={spacing!r} is not available for flow matching; choose "
                f"{' or '.join(FLOW_SPACINGS)}."
            )
        self._set_steps(trailing_times(len(self), config["shift"]), None, unshifted=False)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create this scheduler from the config of any flow-matching scheduler.

        Args:
            config: `other.config`, or the dictionary read from a `scheduler_config.json`.
            return_unused_kwargs: as in diffusers.
            kwargs: parameters that override the config, for example `timestep_spacing="trailing"`. With
                `prediction_type="flow_prediction"`, betas are assumed to belong to the base of a fine-tuned model, and
                ignored.

        Raises:
            ValueError: the config belongs to a model with betas.
        """
        if isinstance(config, Mapping):
            if config.get("_class_name") not in subclass_names(FlowMatchScheduler):
                prediction = {"prediction_type": kwargs["prediction_type"]} if "prediction_type" in kwargs else {}
                config = flow_model_config({**config, **prediction})
            if "timestep_spacing" in kwargs:
                config = {key: value for key, value in config.items() if key != OWN_SPACING}
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler.register_to_config(**{DEFAULTS: []})
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- flow times

    @property
    def shift(self) -> float:
        """The shift of flow times; see `shifted_time`."""
        return float(self.config["shift"])

    def set_shift(self, shift: float) -> None:
        """Change the shift of flow times in the config, for the next `set_timesteps`.

        Raises:
            ValueError: shift not above 0.
        """
        check_shift(shift)
        self.register_to_config(shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the flow times that sampling visits.

        Pipelines pass 1, (n - 1) / n, ..., 1 / n as `sigmas` by default. These are treated as a request for n steps,
        with the config's spacing. Other sigmas are used as given, with diffusers' shift.

        Args:
            num_inference_steps: number of steps, at least 1.
            device: device of `timesteps`.
            sigmas: flow times in (0, 1] before the shift, strictly decreasing; a final 0 is allowed.
            mu: the shift for this image size, according to the config's `time_shift_type`; without dynamic shifting it
                is ignored, as in diffusers, whose pipelines pass it anyway.
            timesteps: the same as `sigmas`, times `num_train_timesteps`. With both, the network's timesteps are flow
                times before the shift (CogView4).

        Raises:
            ValueError: no step count, invalid flow times, or `mu` missing with dynamic shifting.
        """
        self._check_config()
        given = self._parse_flow_times(sigmas, timesteps)
        n = num_inference_steps if given is None else len(given)
        if n is None:
            raise ValueError("Pass either num_inference_steps or sigmas or timesteps to set_timesteps.")
        if num_inference_steps not in (None, n):
            raise ValueError(f"num_inference_steps={num_inference_steps}, but {n} flow times are given.")
        of_pipeline = given is not None and is_stock_spacing(given)
        own = None if of_pipeline else given
        if mu is not None and not (of_pipeline or self.config["use_dynamic_shifting"]):
            logger.warning_once(
                f"mu={mu} is ignored because the config does not use dynamic shifting. To use it, pass "
                "use_dynamic_shifting=True to from_config."
            )
        kappa = own is None and own_spacing(self.config) == "kappa"
        shift, terminal = self._resolve_shift(mu, kappa), self.config["shift_terminal"]
        if own is not None:
            times = stretch_to_terminal([float(shifted_time(s, shift)) for s in own], terminal)
            if times[0] < 1:
                logger.warning(
                    f"The first sigma is {times[0]:g}: sampling assumes signal that pure noise does not contain. "
                    "Begin with 1, unless the sample is a noised image."
                )
        else:
            times = kappa_times(n) if kappa else trailing_times(n, shift, terminal)
        self.num_inference_steps = n
        self._begin_index = None
        both = sigmas is not None and timesteps is not None
        self._set_steps(times, device, unshifted=both, shift=shift)
        self._updates_from(0, self._eta)

    def _parse_flow_times(
        self, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
    ) -> list[float] | None:
        """The caller's own flow times, from `sigmas` or else `timesteps`; None if neither is passed."""
        if sigmas is not None:
            if timesteps is not None and len(sigmas) != len(timesteps):
                raise ValueError(
                    f"{len(sigmas)} sigmas and {len(timesteps)} timesteps are given; their numbers must be equal."
                )
            return check_flow_times(sigmas)
        if timesteps is None:
            return None
        return check_flow_times([float(t) / len(self) for t in timesteps])

    def _resolve_shift(self, mu: float | None, asks_for_kappa: bool) -> float:
        """The shift of flow times for this `mu`; 1 with kappa spacing, which needs none."""
        if not self.config["use_dynamic_shifting"]:
            return self.shift
        if mu is not None:
            return dynamic_shift(mu, self.config["time_shift_type"])
        if asks_for_kappa:
            return 1.0
        raise ValueError("The config has use_dynamic_shifting=True: pass mu, the shift for this image size.")

    def _set_steps(
        self, times: Sequence[float], device: str | torch.device | None, unshifted: bool, shift: float = 1.0
    ) -> None:
        """Set the sampler's path to flow times.

        Args:
            times: of the samples.
            device: device of `timesteps`.
            unshifted: whether the network's timesteps are flow times before `shift`.
            shift: see `shifted_time`.
        """
        inputs = torch.tensor([unshifted_time(s, shift) if unshifted else s for s in times], dtype=torch.float64)
        if inverted := self.config["invert_sigmas"]:
            inputs = 1 - inputs
        timesteps = (inputs * len(self)).float().tolist()
        if not unshifted:  # the level is the one that the network reads in float32
            times = [1 - t / len(self) if inverted else t / len(self) for t in timesteps]
        self._set_path(timesteps, [flow_level(s) for s in times], device)
        sigmas = torch.tensor([*times, 0.0], dtype=torch.float64)
        self.sigmas = (1 - sigmas if inverted else sigmas).float()
        if inverted:
            self._x_0_factors = [(a, -b) for a, b in self._x_0_factors]

    def _path_index(self, timestep: float | Tensor) -> int:
        """Index of a timestep on the path; a timestep that a pipeline rounded to an integer maps to the nearest."""
        try:
            return super()._path_index(timestep)
        except ValueError:
            near = [index for known, index in self._index_of.items() if abs(known - float(timestep)) < 1]
            if len(near) != 1:
                raise
            return near[0]

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of a timestep in `timesteps`."""
        return self._path_index(timestep)

    @property
    def step_index(self) -> int | None:
        """Number of steps of the run so far; None before the first."""
        return self._next or None

    # -- one step

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s to the next flow time, or to x_0 from the last one.

        Args:
            model_output: the network's output at `timestep`, shape [B, ...].
            timestep: one of `timesteps`.
            sample: x_s, same shape; float16 and bfloat16 are computed in float32.
            generator: source of the noise of an SDE, one or one per sample.
            variance_noise: the noise itself instead, same shape.
            per_token_timesteps: shape [B, tokens], of tokens that are cleaner than `timestep` (the first image of a
                video): these follow Euler's step to the next flow time below their own, as in diffusers. The output
                then has the opposite sign, also as in diffusers.
            return_dict: False returns `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: called before `set_timesteps`, a timestep that was not set, or both noise sources.
        """
        if per_token_timesteps is None:
            return self._step(model_output, timestep, sample, self._eta, generator, variance_noise, return_dict)
        velocity = -model_output
        done = self._step(velocity, timestep, sample, self._eta, generator, variance_noise, return_dict=False)
        previous = self._step_cleaner_tokens(done[0], velocity, timestep, sample, per_token_timesteps)
        if not return_dict:
            return previous, done[1]
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=done[1].clone())

    def _step_cleaner_tokens(
        self, previous: Tensor, velocity: Tensor, timestep: float | Tensor, sample: Tensor, tokens: Tensor
    ) -> Tensor:
        """`previous`, with tokens that are cleaner than `timestep` moved by Euler steps from their own times."""
        times = tokens.to(sample.device, torch.float32) / len(self)  # MPS has no float64
        now = self.sigmas[self._path_index(timestep)].item()
        levels = self.sigmas.to(sample.device)[:, None, None]
        below = torch.where(levels < times - 1e-6, levels, 0.0).amax(dim=0)
        wide = compute_dtype(sample.dtype)
        s, r = (each[..., None].to(wide) for each in (times, below))
        moved = euler_step(sample.to(wide), velocity.to(wide), s, r)
        return torch.where((times < now - 1e-6)[..., None], to_dtype(moved, sample.dtype), previous)

    # -- noising

    def noise_level(self, timesteps: Tensor, like: Tensor) -> NoiseLevel:
        """The level (1 - s, s) of timesteps in [0, T], shaped and placed to multiply a batch of samples.

        Args:
            timesteps: shape [B] or [1]. Those of `timesteps` have their own level, which differs from t / T where the
                network's timesteps are flow times before a shift.
            like: the samples, shape [B, ...]; gives device and dtype (float32 or better).
        """
        shape, wide = (-1, *[1] * (like.ndim - 1)), compute_dtype(like.dtype)
        given = timesteps.flatten().tolist()
        places = [self._index_of.get(t) for t in given]
        s = [t / len(self) if i is None else float(self._path[i].sigma) for t, i in zip(given, places, strict=True)]
        return flow_level(torch.tensor(s, dtype=wide).to(like.device, non_blocking=True).reshape(shape))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s noise.

        Args:
            original_samples: x_0, shape [B, ...].
            noise: N(0, 1), same shape.
            timesteps: shape [B] or [1]; those of `timesteps`, or others in [0, T].

        Returns:
            x_s of the same shape and dtype; the arithmetic is float32 or better.
        """
        level, wide = self.noise_level(timesteps, original_samples), compute_dtype(original_samples.dtype)
        return add_noise(original_samples.to(wide), noise.to(wide), level).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the name and argument order of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))

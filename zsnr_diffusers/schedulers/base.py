"""Base class of schedulers for variance-preserving models: betas, integer timesteps, noising.

It contains no formulas: tables and timesteps come from `zsnr_diffusers.core`, the step from `sampling.py`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ..core import (
    SCHEDULE_NAMES,
    NoiseLevel,
    add_noise,
    betas_of_table,
    check_timesteps,
    dynamic_threshold,
    noise_level,
    schedule_table,
    spaced_timesteps,
    timesteps_of_sigmas,
    training_target,
    x_0_factors,
)
from ..core.choices import check_prediction_type
from ..core.spacing import check_timestep_spacing
from .config import DEFAULTS, OWN_SPACING, model_config, normalize_config, own_spacing
from .sampling import PathSampler, compute_dtype, subclass_names

_Tables = tuple[Tensor, Tensor]
"""alpha and sigma of every training timestep."""


class ZeroSNRScheduler(PathSampler):
    """Base class: schedule, timesteps, noising. Use one of its subclasses.

    Settings of the model keep diffusers' names and defaults. Unlike in diffusers, the schedule ends at a
    signal-to-noise ratio of exactly zero, and timesteps start at T-1 (Lin et al. 2023, arXiv:2305.08891, sections 3.1
    and 3.3).

    `from_config` accepts the config of any diffusers scheduler, keeps its model settings and replaces the rest, so
    `Scheduler.from_config(pipe.scheduler.config)` always gives zero terminal SNR and timesteps from T-1.

    Args:
        num_train_timesteps: T, the number of timesteps that the model was trained with.
        beta_start: first beta of the schedule before rescaling.
        beta_end: last beta before rescaling.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `cosine`, `sigmoid` or `laplace`.
        trained_betas: explicit betas, instead of the four above. num_train_timesteps must be their number or the
            default.
        prediction_type: `v_prediction` or `sample`; `epsilon` only without zero terminal SNR.
        rescale_betas_zero_snr: apply Algorithm 1. False keeps the schedule, for a model that was not retrained.
        timestep_spacing: `trailing`, `linspace`, or `kappa`, which concentrates steps where the signal emerges;
            `leading` only without zero terminal SNR, as it misses T-1. The strength of image-to-image is a fraction of
            the steps, so with `kappa` the same strength starts closer to the image. diffusers' schedulers do not
            support `kappa`, so the config stores `trailing` for them, with `kappa` in a separate entry.
        clip_sample: clip each predicted x_0, for pixel-space models.
        clip_sample_range: to [-range, range].
        thresholding: instead scale each predicted x_0 into [-1, 1] (Imagen's dynamic thresholding), for pixel-space
            models.
        dynamic_thresholding_ratio: the quantile of |x_0| that becomes 1.
        sample_max_value: the largest threshold.
        snr_shift_scale: the schedule's SNR is divided by it, before Algorithm 1 (CogVideoX).

    Raises:
        ValueError: unknown names, invalid betas, epsilon-prediction or leading spacing at zero terminal SNR.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012  diffusers' own form
    _increasing = False  # whether timesteps lead from clean data to noise

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "v_prediction",
        rescale_betas_zero_snr: bool = True,
        timestep_spacing: str = "trailing",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        snr_shift_scale: float = 1.0,
    ) -> None:
        self._set_up()

    def _set_up(self) -> None:
        """Check the config, which diffusers has filled when `__init__` runs, and build the noise schedule from it."""
        self.register_to_config(**normalize_config(self.config), _class_name=type(self).__name__)
        config = self.config
        zero_snr, num_train_timesteps = config["rescale_betas_zero_snr"], config["num_train_timesteps"]
        check_prediction_type(config["prediction_type"], zero_terminal_snr=zero_snr)
        check_timestep_spacing(config["timestep_spacing"])
        if zero_snr and config["timestep_spacing"] == "leading":
            raise ValueError(
                "timestep_spacing='leading' never visits the last timestep, the only one that starts from pure "
                "noise; use 'trailing', or rescale_betas_zero_snr=False to sample a model that was not retrained."
            )
        if zero_snr and num_train_timesteps == 1:
            raise ValueError(
                "num_train_timesteps=1: zero terminal SNR needs at least two timesteps; pass "
                "rescale_betas_zero_snr=False to keep the schedule."
            )
        table = schedule_table(**{name: config[name] for name in SCHEDULE_NAMES})
        if len(table) != num_train_timesteps:
            raise ValueError(f"trained_betas has {len(table)} values for num_train_timesteps={num_train_timesteps}.")

        # For external code, in diffusers' dtype; not used below.
        self.alphas_cumprod, self.betas = table.float(), betas_of_table(table).float()
        self._table = table
        self._tables = cast(_Tables, noise_level(table, torch.arange(len(table))))
        self._tables_on: dict[tuple[torch.device, torch.dtype], _Tables] = {}
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self._set_steps(range(num_train_timesteps - 1, -1, -1), None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create this scheduler from the config of any scheduler for a variance-preserving model.

        Args:
            config: `other.config`, or the dictionary read from a `scheduler_config.json`.
            return_unused_kwargs: as in diffusers.
            kwargs: parameters that override the config, for example `prediction_type="v_prediction"`.

        Raises:
            ValueError: the config belongs to a flow-matching or EDM scheduler, or to a model that this class does not
                support.
        """
        marked = isinstance(config, Mapping) and DEFAULTS in config
        if isinstance(config, Mapping):
            if config.get("_class_name") not in subclass_names(ZeroSNRScheduler):
                accepted = inspect.signature(cls.__init__).parameters
                passed_on = {key: config[key] for key in config if key == OWN_SPACING}
                config = {**model_config(config, accepted), **passed_on}
            overridden = {OWN_SPACING} if "timestep_spacing" in kwargs else set()
            config = {key: value for key, value in config.items() if key not in overridden}
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if marked:
            scheduler.register_to_config(**{DEFAULTS: []})
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    # -- timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set the timesteps that sampling visits, given exactly one of a step count, timesteps, and sigmas.

        Args:
            num_inference_steps: n, from 1 to T, spaced as the config says.
            device: device of `timesteps`.
            timesteps: explicit timesteps, strictly decreasing in [0, T-1] (increasing for inversion).
            sigmas: sigma / alpha of the levels to visit, as in diffusers, strictly decreasing (increasing for
                inversion); each maps to the nearest timestep, infinity and diffusers' 4096 to T-1. A final 0 for clean
                data is allowed.

        Raises:
            ValueError: none or several are given, they are out of range, or two sigmas map to one timestep.
        """
        self._check_config()
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Pass either num_inference_steps or timesteps or sigmas to set_timesteps.")
        if num_inference_steps is not None:
            visited = self._spaced_timesteps(num_inference_steps)
        elif timesteps is not None:
            visited = check_timesteps(timesteps, len(self), self._increasing)
        elif sigmas is not None:
            visited = timesteps_of_sigmas(sigmas, self._table, self._increasing)
        self.num_inference_steps = len(visited)
        self._begin_index = None
        self._set_steps(visited, device)
        self._updates_from(0, self._eta)

    def _spaced_timesteps(self, num_inference_steps: int) -> list[int]:
        """The timesteps of n inference steps with the config's `timestep_spacing`."""
        return spaced_timesteps(own_spacing(self.config), num_inference_steps, self._table)

    def _set_steps(self, visited: Sequence[int], device: str | torch.device | None) -> None:
        """Set the sampler's path to these training timesteps and their noise levels."""
        alphas, sigmas = (table[list(visited)].tolist() for table in self._tables)
        self._set_path(visited, [*map(NoiseLevel, alphas, sigmas)], device)

    def get_original_sample(self, model_output: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that a step would compute from the network's output, for samples at any timesteps.

        Args:
            model_output: the network's output at `timesteps`, shape [B, ...].
            sample: x_t, same shape.
            timesteps: integers in [0, T-1], shape [B] or [1].

        Returns:
            The predicted x_0, clipped or thresholded as configured, with the sample's shape and dtype; the arithmetic
            is float32 or better.

        Raises:
            ValueError: a timestep outside [0, T-1].
        """
        level, wide = self.noise_level(timesteps, sample), compute_dtype(sample.dtype)
        a, b = x_0_factors(self.config["prediction_type"], level)
        return self._clip_x_0(a * sample.to(wide) + b * model_output.to(wide)).to(sample.dtype)

    def _clip_x_0(self, x_0: Tensor) -> Tensor:
        """A predicted x_0, clipped or dynamically thresholded as configured."""
        if self.config["thresholding"]:
            return dynamic_threshold(x_0, self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"])
        if self.config["clip_sample"]:
            return x_0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x_0

    # -- noising

    def noise_level(self, timesteps: Tensor, like: Tensor) -> NoiseLevel:
        """alpha and sigma at a batch of timesteps, shaped and placed to multiply a batch of samples.

        Args:
            timesteps: integers in [0, T-1], shape [B] or [1].
            like: the samples, shape [B, ...]; gives device and dtype (float32 or better).

        Raises:
            ValueError: a timestep outside [0, T-1].
        """
        if timesteps.device.type == "cpu" and not bool(((timesteps >= 0) & (timesteps < len(self))).all()):
            raise ValueError(f"timesteps {timesteps.tolist()} must lie in [0, {len(self) - 1}].")
        key = (like.device, compute_dtype(like.dtype))
        if key not in self._tables_on:
            alphas, sigmas = (table.to(key[1]).to(key[0]) for table in self._tables)
            self._tables_on[key] = alphas, sigmas
        index, shape = timesteps.to(like.device).flatten(), (-1, *[1] * (like.ndim - 1))
        return NoiseLevel(*(table[index].reshape(shape) for table in self._tables_on[key]))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to samples at the given timesteps (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, shape [B, ...].
            noise: N(0, 1), same shape.
            timesteps: integers in [0, T-1], shape [B] or [1].

        Returns:
            x_t of the same shape and dtype; the arithmetic is float32 or better.

        Raises:
            ValueError: a timestep outside [0, T-1].
        """
        level, wide = self.noise_level(timesteps, original_samples), compute_dtype(original_samples.dtype)
        return add_noise(original_samples.to(wide), noise.to(wide), level).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x_0, the target of v-prediction; arguments and result as in `add_noise`."""
        level, wide = self.noise_level(timesteps, sample), compute_dtype(sample.dtype)
        return training_target("v_prediction", sample.to(wide), noise.to(wide), level).to(sample.dtype)

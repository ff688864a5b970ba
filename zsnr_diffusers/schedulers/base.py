"""What the schedulers share: the contract of a diffusers scheduler, over one update rule.

There is no formula here: the tables, the timesteps and the step come from `zsnr_diffusers.core`. What stands here is a
config that survives saving and conversion, and timesteps, devices, dtypes and generators.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core import (
    SCHEDULE_NAMES,
    NoiseLevel,
    Update,
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
from ..core.predictions import check_prediction_type
from ..core.safeguard import Safeguard, corrections, projection
from ..core.spacing import check_spacing
from .config import DEFAULTS, OWN_SPACING, SchedulerConfig, model_facts, normalized, own_spacing

_Tables = tuple[Tensor, Tensor]
"""alpha and sigma of every training timestep."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes as long as a small addition even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _names(cls: type[Any]) -> set[str]:
    """Names of a class's descendants."""
    return {name for sub in cls.__subclasses__() for name in (sub.__name__, *_names(sub))}


class ZeroSNRScheduler(SchedulerMixin, ConfigMixin):
    """What the schedulers share: schedule, timesteps, noising, config. Use one of its subclasses.

    Model facts keep stock's names and defaults. What differs from stock is the schedule, which ends at a
    signal-to-noise ratio of exactly zero, and the timesteps, which start at T-1 (Lin et al. 2023, arXiv:2305.08891,
    sections 3.1 and 3.3).

    `from_config` takes the config of any stock scheduler, keeps what it says of the model and replaces the rest, so
    `Scheduler.from_config(pipe.scheduler.config)` always gives zero terminal SNR and timesteps from T-1.

    Args:
        num_train_timesteps: T, the timesteps that the model was trained with.
        beta_start: first beta of the schedule before its rescale.
        beta_end: last beta, likewise.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `cosine`, `sigmoid` or `laplace`.
        trained_betas: the betas themselves, instead of the four above; a T that is not their number is refused, other
            than the default, which stands for their number.
        prediction_type: `v_prediction` or `sample`; `epsilon` only without zero terminal SNR.
        rescale_betas_zero_snr: apply Algorithm 1. False keeps the schedule, for a model that was not retrained.
        timestep_spacing: `trailing`, `linspace`, or `kappa`, which puts the steps where the signal is; `leading` only
            without zero terminal SNR, as it misses T-1. A strength of image to image is a share of the steps, so with
            `kappa` the same strength starts nearer to the image. Diffusers' schedulers do not know `kappa`: the config
            says `trailing` for them, and keeps `kappa` beside it.
        clip_sample: clip each predicted x_0, for models of pixels.
        clip_sample_range: to [-range, range].
        thresholding: scale each predicted x_0 into [-1, 1] instead (Imagen's dynamic thresholding), likewise.
        dynamic_thresholding_ratio: the quantile of |x_0| that becomes 1.
        sample_max_value: the largest threshold.
        snr_shift_scale: the schedule's SNR is divided by it, before Algorithm 1 (CogVideoX).

    Raises:
        ValueError: unknown names, betas that are none, epsilon or leading at zero terminal SNR.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012  diffusers' own form
    order = 1
    init_noise_sigma = 1.0
    _eta: float = 0.0
    _memory = False  # whether a step uses the outputs of earlier steps
    _increasing = False  # whether timesteps lead from clean data to noise
    _internal_dict: SchedulerConfig  # diffusers' own name

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
        """Make the tables from the config, which diffusers has filled when `__init__` runs."""
        self.register_to_config(**normalized(self.config), _class_name=type(self).__name__)
        config = self.config
        zero_snr, num_train_timesteps = config["rescale_betas_zero_snr"], config["num_train_timesteps"]
        check_prediction_type(config["prediction_type"], zero_terminal_snr=zero_snr)
        check_spacing(config["timestep_spacing"])
        if zero_snr and config["timestep_spacing"] == "leading":
            raise ValueError(
                "timestep_spacing='leading' never visits the last timestep, the only one that starts from pure noise; "
                "use 'trailing', or rescale_betas_zero_snr=False to sample a model that was not retrained."
            )
        if zero_snr and num_train_timesteps == 1:
            raise ValueError(
                "num_train_timesteps=1: zero terminal SNR needs at least two timesteps, one to keep and one to bring "
                "to zero; rescale_betas_zero_snr=False keeps the schedule."
            )
        table = schedule_table(**{name: config[name] for name in SCHEDULE_NAMES})
        if len(table) != num_train_timesteps:
            raise ValueError(f"trained_betas has {len(table)} values for num_train_timesteps={num_train_timesteps}.")

        # For code that looks here, in diffusers' dtype; nothing below reads them.
        self.alphas_cumprod, self.betas = table.float(), betas_of_table(table).float()
        self._table = table
        self._tables = cast(_Tables, noise_level(table, torch.arange(len(table))))
        self._tables_on: dict[tuple[torch.device, torch.dtype], _Tables] = {}
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self._visit(range(num_train_timesteps - 1, -1, -1), None)

    def register_to_config(self, **kwargs: Any) -> None:
        """Add to the config; see diffusers. No value of ours counts as a default that another class may replace."""
        super().register_to_config(**(kwargs | ({DEFAULTS: []} if DEFAULTS in kwargs else {})))
        self._internal_dict = SchedulerConfig(self._internal_dict)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make this scheduler from the config of any scheduler of a variance-preserving model.

        Args:
            config: `other.config`, or the dictionary read from a `scheduler_config.json`.
            return_unused_kwargs: as in diffusers.
            kwargs: parameters that override the config, for example `prediction_type="v_prediction"`.

        Raises:
            ValueError: the config is of a flow-matching or EDM scheduler, or of a model that this class refuses.
        """
        marked = isinstance(config, Mapping) and DEFAULTS in config
        if isinstance(config, Mapping):
            if config.get("_class_name") not in _names(ZeroSNRScheduler):
                accepted = inspect.signature(cls.__init__).parameters
                passed_on = {key: config[key] for key in config if key == OWN_SPACING}
                config = {**model_facts(config, accepted), **passed_on}
            overridden = {OWN_SPACING} if "timestep_spacing" in kwargs else set()
            config = {key: value for key, value in config.items() if key not in overridden}
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if marked:
            scheduler.register_to_config(**{DEFAULTS: []})
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        """Diffusers' schedulers that can be made here: stand-ins for those that need another package are left out."""
        return [each for each in super()._get_compatibles() if not isinstance(each, DummyObject)]

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`; see diffusers.

        Raises:
            ValueError: the config was changed by attribute, which would not be saved.
        """
        self._check_config()
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_config(self) -> None:
        """`scheduler.config.name = value` changes neither the schedule nor what is saved: say so."""
        pairs = ((key, value, getattr(self.config, key, value)) for key, value in self.config.items())
        # A pickled number is another object, and an array has no truth value; so it is their text that is compared.
        changed = [key for key, value, other in pairs if value is not other and repr(value) != repr(other)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} was assigned on the config of {type(self).__name__}, which has no effect; make "
                f"a new one: {type(self).__name__}.from_config(scheduler.config, {changed[0]}=...)."
            )

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
        """Choose the timesteps that sampling visits, by exactly one of their number, themselves, and their noise.

        Args:
            num_inference_steps: n, from 1 to T, spaced as the config says.
            device: where `timesteps` shall lie.
            timesteps: the timesteps themselves, strictly decreasing in [0, T-1] (increasing for inversion).
            sigmas: sigma / alpha of the levels to visit, strictly decreasing (increasing for inversion), like those of
                diffusers; each leads to the nearest timestep, infinity and their 4096 to T-1. A 0 for clean data
                may end them.

        Raises:
            ValueError: none or several are given, they are out of range, or two sigmas lead to one timestep.
        """
        self._check_config()
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Pass either num_inference_steps or timesteps or sigmas to set_timesteps.")
        if num_inference_steps is not None:
            visited = self._spaced(num_inference_steps)
        elif timesteps is not None:
            visited = check_timesteps(timesteps, len(self), self._increasing)
        elif sigmas is not None:
            visited = timesteps_of_sigmas(sigmas, self._table, self._increasing)
        self.num_inference_steps = len(visited)
        self._begin_index = None
        self._visit(visited, device)
        self._updates(0, self._eta)

    def _spaced(self, num_inference_steps: int) -> list[int]:
        """The timesteps of so many steps."""
        return spaced_timesteps(own_spacing(self.config), num_inference_steps, self._table)

    def _visit(self, visited: Sequence[int], device: str | torch.device | None) -> None:
        self.timesteps = torch.tensor(visited, device=device)
        self._index_of = {timestep: index for index, timestep in enumerate(visited)}
        alphas, sigmas = (table[list(visited)].tolist() for table in self._tables)
        self._path = [*map(NoiseLevel, alphas, sigmas)]
        self._x_0_factors = [x_0_factors(self.config["prediction_type"], level) for level in self._path]
        self._plans: dict[tuple[int, float], tuple[list[Update], list[Safeguard]]] = {}
        self._start, self._next = 0, 0
        self._outputs: list[Tensor] = []
        self._held: Tensor | None = None

    def _plan(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """The updates of a run over these levels: what tells one sampler from another."""
        raise NotImplementedError

    def _guard(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """What each update may leave out; none by default."""
        return []

    def _updates(self, start: int, eta: float) -> list[Update]:
        return self._prepared(start, eta)[0]

    def _prepared(self, start: int, eta: float) -> tuple[list[Update], list[Safeguard]]:
        if (start, eta) not in self._plans:
            path = self._path[start:]
            updates = self._plan(path, eta)
            self._plans[start, eta] = updates, self._guard(path, updates, eta)
        return self._plans[start, eta]

    def _index(self, timestep: int | float | Tensor) -> int:
        """Place of a timestep on the path, without waiting for the device.

        Pipelines pass views of `self.timesteps`, and a view knows its place. So a run may start anywhere, and a step
        that does not follow the last one starts a new run.
        """
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            here, path = timestep.untyped_storage().data_ptr(), self.timesteps.untyped_storage().data_ptr()
            if timestep.numel() == 1 and here == path:
                return int(timestep.storage_offset())
        index = self._index_of.get(int(timestep))
        if index is None:
            raise ValueError(
                f"timestep {int(timestep)} is not among the {len(self._index_of)} that set_timesteps chose; pass one "
                "of scheduler.timesteps."
            )
        return index

    @property
    def begin_index(self) -> int | None:
        """Where a pipeline said that it starts (image to image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Prepare the updates of a run from there. Nothing else depends on it: each step finds its own place.

        A place behind the last step is that of a run without steps, as a strength of 0 makes it.
        """
        self._begin_index = begin_index
        if self._memory and begin_index < len(self._path):
            self._updates(begin_index, self._eta)

    # -- one step

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is; variance-preserving samples need no scaling."""
        return sample

    def _step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: Tensor | None,
        return_dict: bool,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps(num_inference_steps) before step.")
        if variance_noise is not None and generator is not None:
            raise ValueError("Pass either generator or variance_noise, not both.")
        index = self._index(timestep)
        if self._memory and index != self._next:  # a run that starts here, or anew
            self._start, self._outputs, self._held = index, [], None
        updates, safeguards = self._prepared(self._start, eta)
        update = updates[index - self._start]

        wide = _wide(sample.dtype)
        x_t = _cast(sample, wide)
        x_0 = self._x_0(_cast(model_output, wide), x_t, index)
        outputs = self._outputs = [x_0, *self._outputs[: len(update.gains) - 1]]
        x_s = x_t * update.keep
        if safeguards and len(outputs) > 1:
            gains = self._safeguarded(outputs, update, safeguards[index - self._start])
            for gain_of_each, output in zip(gains, outputs, strict=True):
                x_s.addcmul_(output, gain_of_each)
        else:
            for gain, output in zip(update.gains, outputs, strict=True):
                x_s.add_(output, alpha=gain)
        if update.noise > 0:
            if variance_noise is None:  # in the sample's dtype, so that a seed means the same noise as in stock
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            x_s.add_(_cast(variance_noise, wide), alpha=update.noise)
        elif len(outputs) > 1 and index + 1 == len(self._path):
            x_s = self._bounded(x_s)
        self._next = index + 1
        if not self._memory or self._next == len(self._path):
            self._outputs = []
        prev_sample, pred_original_sample = _cast(x_s, sample.dtype), _cast(x_0, sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        if self._outputs:  # who asks for it may edit it, as previews do; pipelines ask for the tuple and do not look
            pred_original_sample = pred_original_sample.clone()
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _safeguarded(self, outputs: Sequence[Tensor], update: Update, safeguard: Safeguard) -> list[Tensor]:
        """The gains of each sample, of low order as far as its outputs do not go on as they did."""
        held = projection(outputs[0], outputs[1])
        self._held = held if self._held is None else torch.minimum(held, self._held)
        changes = corrections(self._held, safeguard)
        return [gain + change for gain, change in zip(update.gains, changes, strict=True)]

    def _x_0(self, model_output: Tensor, x_t: Tensor, index: int) -> Tensor:
        a, b = self._x_0_factors[index]
        x_0 = (x_t * a).add_(model_output, alpha=float(b))
        return self._bounded(x_0)

    def get_original_sample(self, model_output: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 as a step would take it from the network's output, for samples of any timesteps.

        Args:
            model_output: the network's output at `timesteps`, shape [B, ...].
            sample: x_t, same shape.
            timesteps: integers in [0, T-1], shape [B] or [1].

        Returns:
            The predicted x_0, clipped or thresholded as the config says, of the sample's shape and dtype; the
            arithmetic is float32 or better.

        Raises:
            ValueError: a timestep outside [0, T-1].
        """
        level, wide = self.noise_level(timesteps, sample), _wide(sample.dtype)
        a, b = x_0_factors(self.config["prediction_type"], level)
        return self._bounded(a * sample.to(wide) + b * model_output.to(wide)).to(sample.dtype)

    def _bounded(self, x_0: Tensor) -> Tensor:
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
        key = (like.device, _wide(like.dtype))
        if key not in self._tables_on:
            alphas, sigmas = (table.to(key[1]).to(key[0]) for table in self._tables)
            self._tables_on[key] = alphas, sigmas
        index, shape = timesteps.to(like.device).flatten(), (-1, *[1] * (like.ndim - 1))
        return NoiseLevel(*(table[index].reshape(shape) for table in self._tables_on[key]))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples to the given timesteps (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, shape [B, ...].
            noise: N(0, 1), same shape.
            timesteps: integers in [0, T-1], shape [B] or [1].

        Returns:
            x_t of the same shape and dtype; the arithmetic is float32 or better.

        Raises:
            ValueError: a timestep outside [0, T-1].
        """
        level, wide = self.noise_level(timesteps, original_samples), _wide(original_samples.dtype)
        return add_noise(original_samples.to(wide), noise.to(wide), level).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x_0, the target of v-prediction; arguments and result as in `add_noise`."""
        level, wide = self.noise_level(timesteps, sample), _wide(sample.dtype)
        return training_target("v_prediction", sample.to(wide), noise.to(wide), level).to(sample.dtype)

"""The schedulers; each is a choice of updates for one common rule.

The `__module__` of their instances is the package `zsnr_diffusers.schedulers`, which `model_index.json` of a saved
pipeline names; that of the classes is this module, where `inspect` finds their source.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ..core import (
    NoiseLevel,
    Update,
    consistency_updates,
    ddim_updates,
    ddpm_updates,
    inversion_updates,
    multistep_updates,
    pndm_updates,
    spaced_timesteps,
)
from ..core.calibrated import WITHOUT, CalibratedSteps, read_calibration
from ..core.choices import check_variance_type
from ..core.multistep import check_order, multistep_safeguards, order_of_run
from ..core.safeguard import Safeguard
from ..core.solvers import check_eta
from ..core.spacing import check_num_inference_steps
from . import CLASSES
from .base import ZeroSNRScheduler
from .config import drop_outdated_calibration, register_to_config_with_base
from .flow import FlowMatchScheduler
from .sampling import PathSampler

_DISTILLED_AT = 50
"""Number of timesteps at which latent consistency models are distilled."""


class ZeroSNRDDIMScheduler(ZeroSNRScheduler):
    """DDIM (Song et al. 2021, arXiv:2010.02502) from pure noise to clean data, at every step count.

    Equal to diffusers' `EulerDiscreteScheduler`, and to `DDIMScheduler` where that steps to its own next timestep.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> from zsnr_diffusers import ZeroSNRDDIMScheduler
        >>> stock = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        >>> scheduler = ZeroSNRDDIMScheduler.from_config(stock.config)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist(), scheduler.alphas_cumprod[-1].item()
        ([999, 749, 499, 249], 0.0)
    """

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """DDIM's updates with noise `eta`."""
        return ddim_updates(path, eta)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to the next visited timestep, or to x_0 from the last one.

        Args:
            model_output: the network's output at `timestep`, shape [B, ...].
            timestep: one of `timesteps`.
            sample: x_t, same shape; float16 and bfloat16 are computed in float32.
            eta: 0 is deterministic, 1 is DDPM; values in between scale the noise (eq. 16).
            use_clipped_model_output: accepted for pipelines that pass it; the noise always follows the clipped x_0.
            generator: source of the noise, one or one per sample.
            variance_noise: explicit noise instead, same shape.
            return_dict: False returns `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: called before `set_timesteps`, a timestep that was not set, eta outside [0, 1], or both noise
                sources.
        """
        return self._step(model_output, timestep, sample, eta, generator, variance_noise, return_dict)


class _SimpleStep(ZeroSNRScheduler):
    """The step of samplers whose noise is determined before sampling starts."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to the next visited timestep, or to x_0 from the last one; arguments as in `ZeroSNRDDIMScheduler`."""
        return self._step(model_output, timestep, sample, self._eta, generator, variance_noise, return_dict)


class ZeroSNRDDPMScheduler(_SimpleStep):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239), at every step count.

    Equal to diffusers' `DDPMScheduler`, and with the posterior's variance to `EulerAncestralDiscreteScheduler`.

    Args:
        variance_type: `fixed_small`, the posterior's variance, or `fixed_large`, beta, which the paper uses for
            CIFAR10 with a thousand steps and which adds too much noise with few.

    The other parameters are those of `ZeroSNRScheduler`.

    Raises:
        ValueError: unknown variance type, and as in `ZeroSNRScheduler`.

    Examples:
        >>> from zsnr_diffusers import ZeroSNRDDPMScheduler
        >>> scheduler = ZeroSNRDDPMScheduler(variance_type="fixed_large")
        >>> scheduler.alphas_cumprod[-1].item()
        0.0
    """

    _eta = 1.0

    @register_to_config_with_base(ZeroSNRScheduler.__init__)
    def __init__(
        self,
        variance_type: str = "fixed_small",
    ) -> None:
        check_variance_type(variance_type)
        self._set_up()

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """DDPM's ancestral updates with the config's `variance_type`."""
        return ddpm_updates(path, self.config["variance_type"])


class _MultistepRun(PathSampler):
    """Updates and safeguards of a run by the config's `solver_order` and `corrector`."""

    def _multistep_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Multistep updates of the order for so many steps."""
        order = order_of_run(self.config["solver_order"], len(path))
        return multistep_updates(path, order, self.config["corrector"], eta)

    def _multistep_safeguards(
        self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float
    ) -> list[Safeguard]:
        """Their safeguards; none at order 1."""
        order = order_of_run(self.config["solver_order"], len(path))
        return [] if order == 1 else multistep_safeguards(path, updates, order, self.config["corrector"], eta)


class ZeroSNRMultistepScheduler(_MultistepRun, _SimpleStep):
    """The recommended sampler: high order from an SNR of exactly zero, for the ODE and for the SDE.

    It combines a polynomial through the last outputs, in a variable that is regular at pure noise and at clean data; a
    corrector without additional network calls; and, with `kappa` spacing, weights and a last step fitted to a spectrum
    from fine detail to brightness (`zsnr_diffusers.core.multistep`). It replaces DPM++ 2M, UniPC, DEIS and similar
    samplers, which must use an artificial SNR at the last timestep.

    With guidance, the network's outputs can overshoot and reverse. The order is reduced for images where this happens,
    so that few steps stay stable at large guidance scales; likewise for the long steps of runs with three or four
    steps (`zsnr_diffusers.core.safeguard`).

    Args:
        solver_order: the highest order, 1 to 3. Runs of fewer than 20 steps use at most 2, which is better there.
        corrector: raise the order by one.
        eta: 0 follows the probability-flow ODE, 1 the reverse SDE with new noise at every step.
        calibration: timesteps and weights that `zsnr calibrate` fitted to one model, by step count as a string: `{"5":
            {"timesteps": [5 of them], "weights": [5 rows], ...}}`; see `zsnr_diffusers.core.calibrated`.
            `set_timesteps(n)` with one of these step counts uses them, without the safeguard. A run that begins after
            the first timestep (image-to-image), or uses other timesteps, has the default weights. Only for eta=0.

    The other parameters are those of `ZeroSNRScheduler`; `timestep_spacing` is `kappa` here. `from_config` drops the
    calibration, with a warning, if an override changes the schedule or sampler.

    Raises:
        ValueError: order or eta out of range, a calibration for another schedule or sampler, and as in
            `ZeroSNRScheduler`.

    Examples:
        >>> from diffusers import UniPCMultistepScheduler
        >>> from zsnr_diffusers import ZeroSNRMultistepScheduler
        >>> stock = UniPCMultistepScheduler(prediction_type="v_prediction")
        >>> scheduler = ZeroSNRMultistepScheduler.from_config(stock.config)
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps.tolist()
        [999, 731, 515, 239, 57]
    """

    _memory = True

    @register_to_config_with_base(ZeroSNRScheduler.__init__)
    def __init__(
        self,
        timestep_spacing: str = "kappa",
        solver_order: int = 3,
        corrector: bool = True,
        eta: float = 0.0,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        check_order(solver_order)
        check_eta(eta)
        self._eta = eta
        self._set_up()
        self._calibrations = self._read_calibration_config(calibration or {})

    def _read_calibration_config(self, calibration: Mapping[str, Any]) -> dict[int, CalibratedSteps]:
        """Parse the `calibration` argument, and register it with JSON-compatible keys."""
        if calibration and self._eta != 0:
            raise ValueError(f"calibration requires eta=0, but eta={self._eta} adds noise; {WITHOUT}")
        found = read_calibration(calibration, self._table, self.config["solver_order"] + self.config["corrector"])
        if calibration:  # JSON types, so that a saved config reads back unchanged
            entries = {str(key): dict(entry) for key, entry in calibration.items()}
            self.register_to_config(calibration=entries)
        return found

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ZeroSNRScheduler.from_config`; drops a calibration that does not fit an override."""
        if isinstance(config, Mapping):
            kwargs |= drop_outdated_calibration(config, kwargs, cls)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _spaced_timesteps(self, num_inference_steps: int) -> list[int]:
        """The calibrated timesteps for this step count, or else those of the config's spacing."""
        steps = self._calibrations.get(num_inference_steps)
        return super()._spaced_timesteps(num_inference_steps) if steps is None else steps.timesteps

    def _calibrated_steps(self, path: Sequence[NoiseLevel]) -> CalibratedSteps | None:
        """The calibrated steps if their timesteps are exactly those of a run over these levels, or else None."""
        steps = self._calibrations.get(len(path))
        return steps if steps is not None and steps.timesteps == [*self._index_of] else None

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """The calibrated steps of this run if there are any, or else multistep updates."""
        if (steps := self._calibrated_steps(path)) is not None:
            return steps.updates(path)
        return self._multistep_updates(path, eta)

    def _make_safeguards(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """Safeguards of multistep updates; none at order 1 and for calibrated steps."""
        return [] if self._calibrated_steps(path) is not None else self._multistep_safeguards(path, updates, eta)


class ZeroSNRPNDMScheduler(_SimpleStep):
    """PNDM's linear multistep (Liu et al. 2022, arXiv:2202.09778; "PLMS"), one network evaluation per step.

    Uses x_0 instead of epsilon, which carries no information at pure noise. `ZeroSNRMultistepScheduler` is the better
    sampler; this one is for comparisons with PNDM.

    Examples:
        >>> from zsnr_diffusers import ZeroSNRPNDMScheduler
        >>> scheduler = ZeroSNRPNDMScheduler()
        >>> scheduler.set_timesteps(50)
        >>> len(scheduler.timesteps)
        50
    """

    _memory = True

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """PNDM's linear multistep updates."""
        return pndm_updates(path)


class ZeroSNRLCMScheduler(_SimpleStep):
    """For distilled models: predicts x_0, then adds new noise for the next timestep (Luo et al. 2023, LCM).

    Visits the timesteps at which the model was distilled, from T-1. The boundary scaling of diffusers' `LCMScheduler`
    has no effect there (at most 7e-6) and is omitted.

    Args:
        original_inference_steps: number of timesteps at which the model was distilled, with trailing spacing; all T if
            the default exceeds T. More steps are possible and visit timesteps in between.

    The other parameters are those of `ZeroSNRScheduler`.

    Examples:
        >>> from zsnr_diffusers import ZeroSNRLCMScheduler
        >>> scheduler = ZeroSNRLCMScheduler()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 759, 499, 259]
    """

    @register_to_config_with_base(ZeroSNRScheduler.__init__)
    def __init__(
        self,
        original_inference_steps: int = _DISTILLED_AT,
    ) -> None:
        self._set_up()
        self._check_original_inference_steps(original_inference_steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the timesteps that sampling visits, among those at which the model was distilled.

        Args:
            num_inference_steps: n, from 1 to T.
            device: device of `timesteps`.
            timesteps: explicit timesteps instead, strictly decreasing in [0, T-1].
            sigmas: noise levels instead, as in `ZeroSNRScheduler.set_timesteps`.
            original_inference_steps: instead of the config's.
            strength: of image-to-image, in (0, 1]: start at this fraction of the distilled timesteps.

        Raises:
            ValueError: a value out of range, or a strength that leaves fewer timesteps than steps.
        """
        if num_inference_steps is None or timesteps is not None or sigmas is not None:
            return super().set_timesteps(num_inference_steps, device, timesteps, sigmas)
        check_num_inference_steps(num_inference_steps, len(self))
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must lie in (0, 1].")
        if original_inference_steps is None:
            original_inference_steps = self.config["original_inference_steps"]
        original = self._check_original_inference_steps(original_inference_steps)
        distilled = spaced_timesteps("trailing", original, self._table)
        distilled = distilled[len(distilled) - int(len(distilled) * strength) :]
        if num_inference_steps > len(distilled):
            if strength != 1:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} at strength={strength}: {len(distilled)} of the "
                    f"{original} timesteps of the distilled model remain; use fewer steps or a higher strength."
                )
            distilled = self._spaced_timesteps(num_inference_steps)
        places = [len(distilled) * k // num_inference_steps for k in range(num_inference_steps)]
        super().set_timesteps(device=device, timesteps=[distilled[place] for place in places])

    def _check_original_inference_steps(self, original_inference_steps: int) -> int:
        """The number of distilled timesteps, at most T if it is the default; refuse others outside [1, T]."""
        if original_inference_steps == _DISTILLED_AT:  # the default is valid for models with fewer timesteps
            return min(original_inference_steps, len(self))
        if not 1 <= original_inference_steps <= len(self):
            raise ValueError(
                f"original_inference_steps={original_inference_steps} must lie in [1, {len(self)}]: pass the number "
                "of timesteps at which the model was distilled."
            )
        return original_inference_steps

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Updates of a consistency model: to x_0, then back to noise."""
        return consistency_updates(path)


class ZeroSNRDDIMInverseScheduler(_SimpleStep):
    """DDIM inversion: from an image to the noise from which `ZeroSNRDDIMScheduler` generates it, over its timesteps.

    Ends at pure noise, T-1. Each step predicts the next sample and, after the network was evaluated there, corrects it
    to the sample from which DDIM's step starts; diffusers' `DDIMInverseScheduler` keeps the uncorrected prediction.

    Pass the clean sample to the first step. `prev_sample` of the last step is the noise. Timesteps increase, including
    explicit ones.

    Examples:
        >>> from zsnr_diffusers import ZeroSNRDDIMInverseScheduler
        >>> scheduler = ZeroSNRDDIMInverseScheduler()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [249, 499, 749, 999]
    """

    _memory = True
    _increasing = True

    def _spaced_timesteps(self, num_inference_steps: int) -> list[int]:
        """The timesteps of the config's spacing, increasing."""
        return super()._spaced_timesteps(num_inference_steps)[::-1]

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Updates of DDIM inversion, from clean data to noise."""
        return inversion_updates(path)


class FlowMatchMultistepScheduler(_MultistepRun, FlowMatchScheduler):
    """The recommended high-order sampler for flow-matching models such as SD3, Flux, Qwen-Image and Wan.

    The counterpart of `ZeroSNRMultistepScheduler` over the levels (1 - s, s): flow matching starts from a
    signal-to-noise ratio of exactly zero, so polynomials, corrector, fitted weights and safeguard are the same.

    Use it with `pipe.scheduler = FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)`. For models distilled
    at a few flow times, use `timestep_spacing="trailing"`, preferably with `solver_order=1` and `corrector=False`.

    Args:
        solver_order: the highest order, 1 to 3. Runs of fewer than 20 steps use at most 2, which is better there.
        corrector: raise the order by one.
        eta: 0 follows the probability-flow ODE, 1 the reverse SDE with new noise at every step.

    The other parameters are those of `FlowMatchScheduler`.

    Raises:
        ValueError: order or eta out of range, and as in `FlowMatchScheduler`.

    Examples:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from zsnr_diffusers import FlowMatchMultistepScheduler
        >>> scheduler = FlowMatchMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
        >>> scheduler.set_timesteps(4)
        >>> [round(t) for t in scheduler.timesteps.tolist()]
        [1000, 900, 609, 206]
    """

    _memory = True

    @register_to_config_with_base(FlowMatchScheduler.__init__)
    def __init__(
        self,
        solver_order: int = 3,
        corrector: bool = True,
        eta: float = 0.0,
    ) -> None:
        check_order(solver_order)
        check_eta(eta)
        self._eta = eta
        self._set_up()

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Multistep updates over flow times, or those of a consistency model under `stochastic_sampling`."""
        if self.config["stochastic_sampling"]:
            return consistency_updates(path)
        return self._multistep_updates(path, eta)

    def _make_safeguards(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """Safeguards of multistep updates; none at order 1 and under `stochastic_sampling`."""
        return [] if self.config["stochastic_sampling"] else self._multistep_safeguards(path, updates, eta)


class FlowMatchEulerScheduler(FlowMatchScheduler):
    """Euler's method for flow-matching models, equivalent to DDIM: order 1, at every step count.

    Equal to diffusers' `FlowMatchEulerDiscreteScheduler` for the same sigmas. Its default sigmas are `trailing`,
    evenly spaced before the shift, so that the first is 1 and none is shifted twice.

    The parameters are those of `FlowMatchScheduler`.

    Examples:
        >>> from zsnr_diffusers import FlowMatchEulerScheduler
        >>> scheduler = FlowMatchEulerScheduler()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [1000.0, 750.0, 500.0, 250.0]
    """

    @register_to_config_with_base(FlowMatchScheduler.__init__)
    def __init__(self, timestep_spacing: str = "trailing") -> None:
        self._set_up()

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Euler's updates over flow times, or those of a consistency model under `stochastic_sampling`."""
        return consistency_updates(path) if self.config["stochastic_sampling"] else ddim_updates(path)


def _name_package_in_instances(cls: type[Any]) -> None:
    """Let schedulers of a class have the package as their `__module__`; subclasses elsewhere keep their own."""

    def new(kind: type[Any], *args: object, **kwargs: object) -> Any:
        scheduler = object.__new__(kind)
        if kind.__module__ == __name__:
            scheduler.__module__ = __package__
        return scheduler

    new.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined]  # that of the class, too
    cls.__new__ = new  # type: ignore[assignment]


for _name in CLASSES:
    _name_package_in_instances(globals()[_name])

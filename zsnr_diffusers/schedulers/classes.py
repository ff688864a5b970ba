"""The schedulers, by the names that people look for; each is a choice of updates over one rule.

Their `__module__` is the package, `zsnr_diffusers.schedulers`: what `model_index.json` of a saved pipeline names.
"""

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
from ..core.multistep import check_order, multistep_safeguards
from ..core.safeguard import Safeguard
from ..core.solvers import check_eta
from ..core.spacing import check_num_inference_steps
from .base import ZeroSNRScheduler
from .config import drop_outdated_calibration, register_to_config_with_base
from .flow import FlowMatchScheduler

_DISTILLED_AT = 50
"""Timesteps that latent consistency models are distilled at."""


class ZeroSNRDDIMScheduler(ZeroSNRScheduler):
    """DDIM (Song et al. 2021, arXiv:2010.02502) from pure noise to clean data, at every step count.

    Equal to stock's `DDIMScheduler` wherever stock steps to its own next timestep, and to `EulerDiscreteScheduler`.

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
            eta: 0 is deterministic, 1 is DDPM; in between the noise of eq. 16.
            use_clipped_model_output: taken for stock pipelines that pass it; the noise always follows the clipped x_0.
            generator: source of the noise, one or one per sample.
            variance_noise: the noise itself instead, same shape.
            return_dict: False returns `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: before `set_timesteps`, at a timestep not chosen, eta outside [0, 1], both noise sources.
        """
        return self._step(model_output, timestep, sample, eta, generator, variance_noise, return_dict)


class _SimpleStep(ZeroSNRScheduler):
    """The step of the samplers whose noise is decided before sampling starts."""

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

    Equal to stock's `DDPMScheduler`, and with the posterior's variance to `EulerAncestralDiscreteScheduler`.

    Args:
        variance_type: `fixed_small`, the posterior's variance, or `fixed_large`, beta, which the paper has for CIFAR10
            in a thousand steps and which adds too much noise in few.

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


class ZeroSNRMultistepScheduler(_SimpleStep):
    """The recommended sampler: high order from an SNR of exactly zero, for the ODE and for the SDE.

    A polynomial through the last outputs in a variable that is regular at pure noise and at clean data, a corrector
    without a further network call, and, where the steps are spaced by `kappa`, weights and last step fitted to a
    spectrum from fine detail to brightness (`zsnr_diffusers.core.multistep`). It takes the place of DPM++ 2M, UniPC,
    DEIS and their relatives, which have to fake an SNR at the last timestep.

    Under guidance the network's outputs overshoot and fall back. An image in which they do is led on with low order,
    as far as they do, so that few steps stay stable at large guidance scales; so are the long steps of runs of three
    and four (`zsnr_diffusers.core.safeguard`).

    Args:
        solver_order: 1 to 3. 2 is best up to some 20 steps, 3 beyond.
        corrector: raise the order by one.
        eta: 0 follows the probability-flow ODE, 1 the reverse SDE with fresh noise at every step.
        calibration: timesteps and weights that `zsnr calibrate` fitted to one model, by step count as a text:
            `{"5": {"timesteps": [5 of them], "weights": [5 rows], ...}}`; see `zsnr_diffusers.core.calibrated`.
            `set_timesteps(n)` with one of these numbers takes them, without the safeguard. A run that begins behind
            the first timestep (image-to-image) visits the timesteps with the default's weights, and so do other
            timesteps. They are for eta 0 only.

    The other parameters are those of `ZeroSNRScheduler`; `timestep_spacing` is `kappa` here. `from_config` leaves out
    the calibration, with a warning, where an override makes another schedule or sampler than it was made for.

    Raises:
        ValueError: order or eta out of range, a calibration of another schedule or sampler, and as in
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
        solver_order: int = 2,
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
        """Parse the `calibration` argument, and register it with keys as JSON has them."""
        if calibration and self._eta != 0:
            raise ValueError(f"calibration is made for eta=0, and eta={self._eta} adds noise; {WITHOUT}")
        found = read_calibration(calibration, self._table, self.config["solver_order"] + self.config["corrector"])
        if calibration:  # numbers as JSON has them, so that a config reads back as it was
            entries = {str(key): dict(entry) for key, entry in calibration.items()}
            self.register_to_config(calibration=entries)
        return found

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ZeroSNRScheduler.from_config`; an override that a calibration was not made for leaves it out."""
        if isinstance(config, Mapping):
            kwargs |= drop_outdated_calibration(config, kwargs, cls)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _spaced_timesteps(self, num_inference_steps: int) -> list[int]:
        """The calibrated timesteps of this step count, or else those of the config's spacing."""
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
        order, corrector = self.config["solver_order"], self.config["corrector"]
        return multistep_updates(path, order, corrector, eta)

    def _make_safeguards(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """Safeguards of multistep updates; none at order 1 and for calibrated steps."""
        if self.config["solver_order"] == 1 or self._calibrated_steps(path) is not None:
            return []
        return multistep_safeguards(path, updates, eta)


class ZeroSNRPNDMScheduler(_SimpleStep):
    """PNDM's linear multistep (Liu et al. 2022, arXiv:2202.09778; "PLMS"), one network evaluation per step.

    On x_0 in place of epsilon, which pure noise says nothing about. `ZeroSNRMultistepScheduler` is the better sampler;
    this one is for results that are to be compared with PNDM.

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
    """For distilled models: to x_0 at once, then back to the next timestep with fresh noise (Luo et al. 2023, LCM).

    Visits the timesteps that the model was distilled at, from T-1 on. The boundary scaling of stock's `LCMScheduler`
    changes nothing at them (by 7e-6 at most) and is left out.

    Args:
        original_inference_steps: how many timesteps the model was distilled at, spaced by trailing; all T if the
            default exceeds T. More steps than that are possible and lead to timesteps in between.

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
        """Choose the timesteps that sampling visits, among those that the model was distilled at.

        Args:
            num_inference_steps: n, from 1 to T.
            device: where `timesteps` shall lie.
            timesteps: the timesteps themselves instead, strictly decreasing in [0, T-1].
            sigmas: noise levels instead, as in `ZeroSNRScheduler.set_timesteps`.
            original_inference_steps: in place of the config's.
            strength: of image-to-image, in (0, 1]: start at this share of the distilled timesteps.

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
                    f"num_inference_steps={num_inference_steps} at strength={strength}: {len(distilled)} are left of "
                    f"the {original} timesteps that the model was distilled at; take fewer steps or more strength."
                )
            distilled = self._spaced_timesteps(num_inference_steps)
        places = [len(distilled) * k // num_inference_steps for k in range(num_inference_steps)]
        super().set_timesteps(device=device, timesteps=[distilled[place] for place in places])

    def _check_original_inference_steps(self, original_inference_steps: int) -> int:
        """The number of distilled timesteps, at most T if it is the default; refuse others outside [1, T]."""
        if original_inference_steps == _DISTILLED_AT:  # a default refuses no model of fewer timesteps
            return min(original_inference_steps, len(self))
        if not 1 <= original_inference_steps <= len(self):
            raise ValueError(
                f"original_inference_steps={original_inference_steps} must lie in [1, {len(self)}]: "
                f"pass the number of timesteps that the model was distilled at."
            )
        return original_inference_steps

    def _make_updates(self, path: Sequence[NoiseLevel], eta: float) -> list[Update]:
        """Updates of a consistency model: to x_0, then back to noise."""
        return consistency_updates(path)


class ZeroSNRDDIMInverseScheduler(_SimpleStep):
    """DDIM inversion: from an image to the noise from which `ZeroSNRDDIMScheduler` generates it, over its timesteps.

    Ends at pure noise itself, T-1. Each step predicts the next sample, and corrects it, once the network has seen it,
    to what DDIM's step starts from; stock's `DDIMInverseScheduler` keeps the prediction, and its error.

    Pass the clean sample to the first step. `prev_sample` of the last step is the noise. Timesteps increase, also a
    caller's own.

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


class FlowMatchMultistepScheduler(FlowMatchScheduler):
    """The sampler to use for flow-matching models: SD3, Flux, Qwen-Image, Wan and others, of high order from noise on.

    What `ZeroSNRMultistepScheduler` is for models with betas, over the levels (1 - s, s): flow matching starts from a
    signal-to-noise ratio of exactly zero, so polynomials, corrector, fitted weights and safeguard are the same.

    `pipe.scheduler = FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)` swaps it in. Models that were
    distilled at a few flow times keep them with `timestep_spacing="trailing"`, best with `solver_order=1` and
    `corrector=False`.

    Args:
        solver_order: 1 to 3. 2 is best up to some 20 steps, 3 beyond.
        corrector: raise the order by one.
        eta: 0 follows the probability-flow ODE, 1 the reverse SDE with fresh noise at every step.

    The other parameters are those of `FlowMatchScheduler`.

    Raises:
        ValueError: order or eta out of range, and as in `FlowMatchScheduler`.

    Examples:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from zsnr_diffusers import FlowMatchMultistepScheduler
        >>> scheduler = FlowMatchMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
        >>> scheduler.set_timesteps(4)
        >>> [round(t) for t in scheduler.timesteps.tolist()]
        [1000, 870, 559, 188]
    """

    _memory = True

    @register_to_config_with_base(FlowMatchScheduler.__init__)
    def __init__(
        self,
        solver_order: int = 2,
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
        return multistep_updates(path, self.config["solver_order"], self.config["corrector"], eta)

    def _make_safeguards(self, path: Sequence[NoiseLevel], updates: Sequence[Update], eta: float) -> list[Safeguard]:
        """Safeguards of multistep updates; none at order 1 and under `stochastic_sampling`."""
        if self.config["solver_order"] == 1 or self.config["stochastic_sampling"]:
            return []
        return multistep_safeguards(path, updates, eta)


class FlowMatchEulerScheduler(FlowMatchScheduler):
    """Euler's method for flow-matching models, which is DDIM's: order 1, at every step count.

    Equal to stock's `FlowMatchEulerDiscreteScheduler` on the same sigmas; its own, by default, are `trailing`, evenly
    spaced before the shift, so that the first is 1 and none is shifted twice.

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


for _public in (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
):
    _public.__module__ = __package__

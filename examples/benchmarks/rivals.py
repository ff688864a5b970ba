"""Samplers that diffusers does not have at zero terminal SNR and other programs do, from the papers' equations.

All but UniPC solve the probability-flow ODE in the variance-exploding variables of Karras et al. 2022
(arXiv:2206.00364): with z = x_t / alpha and sigma = sqrt(1 - alpha_bar) / sqrt(alpha_bar),

    dz / dsigma = d(z, sigma) = (z - x_0(z, sigma)) / sigma,

and take steps z' = z + sum_j w_j d_j over the newest and earlier derivatives. They differ in the weights w_j.

At an SNR of zero sigma is infinite and these variables do not exist. As ComfyUI does, the last alpha_bar is therefore
set to 4.8973451890853435e-08, a sigma of 4518.8, where the network is told the last timestep nonetheless.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from scipy.stats import beta
from torch import Tensor

from zsnr_diffusers.core import SCHEDULE_NAMES, kappa, noise_level, schedule_table, x_0_factors
from zsnr_diffusers.core.noise import noise_level_of_ratio

SMALLEST_ALPHA_BAR = 4.8973451890853435e-08
"""Stands for an alpha_bar of 0."""
ADAMS_BASHFORTH = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
"""Weights for even steps, the newest derivative first."""
GAMMA = 2.0
"""Permenter & Yuan's choice."""
LARGEST_FLOW_TIME = 1 - 1e-6
"""Stands for a flow time of 1 in log SNR, as in diffusers."""


def beta_timesteps(n: int, sigmas: np.ndarray) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) over [0, T-1], from 1 down to 1/n (Lee et al. 2024, arXiv:2407.12173)."""
    return beta.ppf(1 - np.arange(n) / n, 0.6, 0.6) * (len(sigmas) - 1)


def normal_timesteps(n: int, sigmas: np.ndarray) -> np.ndarray:
    """Even from T-1 to 0, both among them."""
    return np.linspace(len(sigmas) - 1, 0, n)


def exponential_timesteps(n: int, sigmas: np.ndarray) -> np.ndarray:
    """Even in log sigma, from the largest to the smallest."""
    logs = np.log(sigmas)
    return np.interp(np.linspace(logs[-1], logs[0], n), logs, np.arange(len(logs)))


GRIDS: dict[str, Callable[[int, np.ndarray], np.ndarray]] = {
    "beta": beta_timesteps,
    "normal": normal_timesteps,
    "exponential": exponential_timesteps,
}


def integral_weights(sigmas: Sequence[float], step: int, order: int) -> list[float]:
    """Weights of the integral, over a step, of the polynomial through the last derivatives.

    They integrate 1, u, ..., u^(k-1) exactly, where u runs from 0 to 1 over the step.

    Args:
        sigmas: all levels, decreasing.
        step: from `sigmas[step]` to the next.
        order: of the polynomial plus one; at the first steps as much of it as there are derivatives.

    Returns:
        k = min(order, step + 1) weights, the newest derivative first.
    """
    k, h = min(order, step + 1), sigmas[step + 1] - sigmas[step]
    u = [(sigmas[step - j] - sigmas[step]) / h for j in range(k)]
    powers = np.vander(u, increasing=True).T
    return (h * np.linalg.solve(powers, 1 / np.arange(1, k + 1))).tolist()


class RivalScheduler(SchedulerMixin, ConfigMixin):
    """What the samplers here share: schedule, grid, and the step of a linear multistep method in z.

    Samples are z = x_t / alpha, which `scale_model_input` brings to the network's variables.

    Args:
        num_train_timesteps: T.
        beta_start: as for all schedulers, like the following.
        beta_end: last beta.
        beta_schedule: how betas lie between.
        trained_betas: the betas themselves.
        snr_shift_scale: of CogVideoX.
        prediction_type: what the network returns.
        rescale_betas_zero_snr: whether the schedule is brought to zero terminal SNR.
        timestep_spacing: one of `GRIDS`. Its timesteps are rounded, as a network knows whole ones, with the sigma of
            each; those that occur twice are taken once, so there may be fewer than asked for.
        solver_order: how many derivatives are kept.
        lower_order_final: whether the last step, to sigma = 0, has order 1, which makes its result the last x_0.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        snr_shift_scale: float = 1.0,
        prediction_type: str = "v_prediction",
        rescale_betas_zero_snr: bool = True,
        timestep_spacing: str = "beta",
        solver_order: int = 4,
        lower_order_final: bool = False,
    ) -> None:
        table = schedule_table(**{name: self.config[name] for name in SCHEDULE_NAMES})
        level = noise_level(table.clamp(min=SMALLEST_ALPHA_BAR), torch.arange(num_train_timesteps))
        self._table = 1 / torch.as_tensor(kappa(level)).numpy()
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose at most so many timesteps; forgets what the last run left."""
        found = GRIDS[self.config.timestep_spacing](num_inference_steps, self._table)
        steps = np.unique(found.round().astype(np.int64))[::-1].copy()
        self.timesteps = torch.from_numpy(steps).to(device)
        self.start([*self._table[steps].tolist(), 0.0])

    def start(self, sigmas: Sequence[float]) -> None:
        """Begin a run over these levels, one more than there are timesteps."""
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self._levels, self._step = list(sigmas), 0
        self._derivatives: list[Tensor] = []

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of z at the first timestep, over data of standard deviation 1."""
        return math.hypot(1, self._levels[0])

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """x_t = alpha z."""
        return sample / math.hypot(1, self._levels[self._step])

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """z at the next level, of any shape; steps follow each other in the order of the timesteps."""
        sigma = self._levels[self._step]
        level = noise_level_of_ratio(sigma)
        a, b = x_0_factors(self.config.prediction_type, level)
        x_0 = a * level.alpha * sample + b * model_output
        return self.move((sample - x_0) / sigma, sample, return_dict)

    def move(self, derivative: Tensor, sample: Tensor, return_dict: bool) -> SchedulerOutput | tuple[Tensor]:
        """z at the next level, given dz / dsigma here."""
        sigma = self._levels[self._step]
        self._derivatives = [derivative, *self._derivatives[: self.config.solver_order - 1]]
        if self.config.lower_order_final and self._levels[self._step + 1] == 0:
            weights = [-sigma]
        else:
            weights = self.weights(self._levels, self._step)
        moves = (w * d for w, d in zip(weights, self._derivatives, strict=False))  # the oldest may go unused
        sample = sum(moves, start=sample)
        self._step += 1
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def weights(self, sigmas: Sequence[float], step: int) -> list[float]:
        """Of the newest derivative, the one before and so on, for the step from `sigmas[step]`."""
        raise NotImplementedError


class LMSScheduler(RivalScheduler):
    """Linear multistep in sigma: the polynomial through the last derivatives, integrated exactly.

    Adams and Bashforth's method for uneven steps (Hairer, Norsett & Wanner 1993, section III.5), which is also what
    the variable-step variant of iPNDM is.
    """

    def weights(self, sigmas: Sequence[float], step: int) -> list[float]:
        """Those of `integral_weights`."""
        return integral_weights(sigmas, step, self.config.solver_order)


class IPNDMScheduler(RivalScheduler):
    """Improved PNDM (Zhang & Chen 2023, arXiv:2204.13902, after Liu et al. 2022, arXiv:2202.09778).

    The weights of Adams and Bashforth for even steps, on steps that are not; lower orders at the start in place of
    PNDM's Runge-Kutta steps.
    """

    def weights(self, sigmas: Sequence[float], step: int) -> list[float]:
        """Those of `ADAMS_BASHFORTH`, times the step."""
        h = sigmas[step + 1] - sigmas[step]
        return [h * w for w in ADAMS_BASHFORTH[min(self.config.solver_order, step + 1) - 1]]


class GradientEstimationScheduler(RivalScheduler):
    """Permenter & Yuan 2023 (arXiv:2306.04848), section 4: a step along gamma d + (1 - gamma) d_before.

    gamma = 3/2 would be Adams and Bashforth's order 2 for even steps; 2 is the paper's choice, of order 1.
    """

    def weights(self, sigmas: Sequence[float], step: int) -> list[float]:
        """gamma and 1 - gamma, times the step; Euler's method at the first."""
        h = sigmas[step + 1] - sigmas[step]
        return [h] if step == 0 else [h * GAMMA, h * (1 - GAMMA)]


class FlowRivalScheduler(RivalScheduler):
    """The same methods on a flow-matching model: with z = x_s and sigma = s, d is what the network returns.

    Args:
        num_train_timesteps: what the network calls flow time 1, and how many times a grid chooses from.
        shift: of the flow times 1 / T, 2 / T, ..., 1 (Esser et al. 2024, arXiv:2403.03206, eq. 23).
        timestep_spacing: one of `GRIDS`.
        solver_order: how many derivatives are kept.
        lower_order_final: whether the last step, to s = 0, has order 1.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        timestep_spacing: str = "beta",
        solver_order: int = 4,
        lower_order_final: bool = False,
    ) -> None:
        times = np.arange(1, num_train_timesteps + 1) / num_train_timesteps
        self._table = shift * times / (1 + (shift - 1) * times)
        self.set_timesteps(num_train_timesteps)

    def start(self, sigmas: Sequence[float]) -> None:
        """Begin a run over these flow times, one more than there are timesteps."""
        super().start(sigmas)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Unchanged."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at the next flow time, of any shape."""
        return self.move(model_output, sample, return_dict)


class FlowLMSScheduler(FlowRivalScheduler):
    """`LMSScheduler` on a flow-matching model."""

    weights = LMSScheduler.weights


class FlowIPNDMScheduler(FlowRivalScheduler):
    """`IPNDMScheduler` on a flow-matching model."""

    weights = IPNDMScheduler.weights


class FlowGradientEstimationScheduler(FlowRivalScheduler):
    """`GradientEstimationScheduler` on a flow-matching model."""

    weights = GradientEstimationScheduler.weights


class UniPCBH2Scheduler(RivalScheduler):
    """UniPC with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867), which diffusers has, on the grids here.

    In the network's variables, from pure noise. The last step has order 1, as at sigma = 0 its log SNR has no end.
    """

    init_noise_sigma = 1.0

    def start(self, sigmas: Sequence[float]) -> None:
        """Begin a run of diffusers' class, over these levels in place of its own."""
        super().start(sigmas)
        self._solver = unipc_bh2(self, prediction_type=self.config.prediction_type)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Unchanged."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """x_t at the next level, of shape [B, ...]."""
        return self._solver.step(model_output, timestep, sample, return_dict=return_dict)


class FlowUniPCBH2Scheduler(FlowRivalScheduler):
    """`UniPCBH2Scheduler` on a flow-matching model, from where diffusers starts: at s = 1 log SNR has no beginning."""

    def start(self, sigmas: Sequence[float]) -> None:
        """Begin a run of diffusers' class, over these flow times in place of its own."""
        super().start([min(s, LARGEST_FLOW_TIME) for s in sigmas])
        self._solver = unipc_bh2(self, prediction_type="flow_prediction", use_flow_sigmas=True)

    step = UniPCBH2Scheduler.step


def unipc_bh2(scheduler: RivalScheduler, **model: Any) -> UniPCMultistepScheduler:
    """diffusers' class, about to run over the levels of a scheduler here."""
    solver = UniPCMultistepScheduler(
        solver_order=scheduler.config.solver_order,
        solver_type="bh2",
        num_train_timesteps=scheduler.config.num_train_timesteps,
        **model,
    )
    solver.set_timesteps(len(scheduler.timesteps))
    solver.timesteps, solver.sigmas = scheduler.timesteps, scheduler.sigmas
    return solver

"""Denoisers that know the data's distribution exactly, and where the exact probability-flow ODE leads.

With y = x / sigma and kappa = alpha / sigma the ODE is dy / dkappa = E[x_0 | x], from y = x_T at kappa = 0 to
x_0 = lim y / kappa. For Gaussian data that limit is s x_T; for mixtures it is integrated here, by a method that shares
nothing with the samplers under test. What a sampler is off is then its own doing, as no network errs beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsnr_diffusers.core import NoiseLevel, classifier_free_guidance, rescale_guidance, x_0_factors

NEARLY_CLEAN = 1e5
"""kappa at which E[x_0 | x] stands for x_0: a mode of width s is then off by 1 / (2 s^2 kappa^2), relatively."""


def noise_level_of_kappa(kappa: float) -> NoiseLevel:
    """The level whose alpha / sigma is kappa, 0 at pure noise."""
    return NoiseLevel(kappa / math.hypot(1, kappa), 1 / math.hypot(1, kappa))


@dataclass
class Gaussian:
    """N(mean, diag(std^2)), both of shape [d]."""

    name: str
    std: Tensor
    mean: Tensor | float = 0.0
    is_gaussian = True

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the data in each dimension, shape [d]."""
        return self.std

    def x_0(self, y: Tensor, kappa: float) -> Tensor:
        """E[x_0 | x] at y = x / sigma of shape [N, d]."""
        return (self.mean + self.std**2 * kappa * y) / (1 + (self.std * kappa) ** 2)

    def endpoint(self, noise: Tensor, num_steps: int) -> Tensor:
        """Where the exact ODE leads from `noise` [N, d]."""
        return self.mean + self.std * noise


@dataclass
class Mixture:
    """Isotropic Gaussian modes: means [K, d], stds [K], weights [K] that sum to one."""

    name: str
    means: Tensor
    stds: Tensor
    weights: Tensor
    is_gaussian = False

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the data in each dimension, shape [d]."""
        second = self.weights @ (self.means**2 + self.stds[:, None] ** 2)
        return (second - (self.weights @ self.means) ** 2).sqrt()

    def x_0(self, y: Tensor, kappa: float) -> Tensor:
        """E[x_0 | x] at y = x / sigma of shape [N, d]: the posterior means of the modes, by their posterior weights.

        y of a mode is N(kappa mean, 1 + kappa^2 std^2).
        """
        variance = 1 + (kappa * self.stds) ** 2
        distance = (y**2).sum(1, keepdim=True) - 2 * kappa * y @ self.means.T + (kappa * self.means).pow(2).sum(1)
        logits = self.weights.log() - distance / (2 * variance) - y.shape[1] / 2 * variance.log()
        mode = logits.softmax(1)
        return mode @ (self.means / variance[:, None]) + (mode @ (kappa * self.stds**2 / variance))[:, None] * y

    def endpoint(self, noise: Tensor, num_steps: int) -> Tensor:
        """Where the exact ODE leads from `noise` [N, d]."""
        return integrated(self.x_0, noise, num_steps)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Data, shape [num, d]."""
        mode = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[mode] + self.stds[mode, None] * noise


def integrated(x_0: Callable[[Tensor, float], Tensor], y: Tensor, num_steps: int) -> Tensor:
    """Where dy / dkappa = x_0(y, kappa) leads: Runge and Kutta's fourth order, even in asinh(60 kappa)."""
    h = math.asinh(60 * NEARLY_CLEAN) / num_steps

    def slope(y: Tensor, w: float) -> Tensor:
        return x_0(y, math.sinh(w) / 60) * (math.cosh(w) / 60)

    for step in range(num_steps):
        w = step * h
        k1 = slope(y, w)
        k2 = slope(y + h / 2 * k1, w + h / 2)
        k3 = slope(y + h / 2 * k2, w + h / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, w + h))
    return x_0(y, NEARLY_CLEAN)


@dataclass
class Guided:
    """Two denoisers under classifier-free guidance, u + w (c - u), rescaled as Lin et al. 2023, Algorithm 2, has it.

    Rescaled is the output of a network with v-prediction, as a pipeline does; the spread is over all dimensions of a
    sample. In two of them it passes zero on the way, where the algorithm has no limit, so there is no exact path.
    """

    unconditional: "Gaussian | Mixture"
    conditional: "Gaussian | Mixture"
    scale: float
    rescale: float = 0.0

    @property
    def name(self) -> str:
        """The case's and the guidance scale."""
        return f"{self.conditional.name}, w = {self.scale:g}"

    @property
    def is_gaussian(self) -> bool:
        """Whether both are."""
        return self.conditional.is_gaussian

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the conditional data in each dimension, shape [d]."""
        return self.conditional.spread

    def x_0(self, y: Tensor, kappa: float) -> Tensor:
        """The guided prediction at y = x / sigma of shape [N, d]."""
        u, c = (each.x_0(y, kappa) for each in (self.unconditional, self.conditional))
        guided = classifier_free_guidance(u, c, self.scale)
        if self.rescale == 0:
            return guided
        level = noise_level_of_kappa(kappa)
        a, b = x_0_factors("v_prediction", level)
        x = level.sigma * y
        v, v_c = ((x_0 - a * x) / b for x_0 in (guided, c))
        return a * x + b * rescale_guidance(v, v_c, self.rescale)

    def endpoint(self, noise: Tensor, num_steps: int) -> Tensor:
        """Where the exact guided ODE leads from `noise` [N, d]."""
        return integrated(self.x_0, noise, num_steps)


Case = Gaussian | Mixture | Guided

"""The distribution of the low frequencies of x_0 given a prompt, and samples x_t from it at any noise level.

A network that was trained on x_t = alpha x_0 + sigma noise with alpha > 0 at the last timestep infers the low
frequencies of the image, especially its brightness, from the signal left in x_T: there the signal is stronger than the
noise, since the power of images increases towards low frequencies. Sampling starts from noise without this signal, so
every image becomes medium gray. Everaert et al. 2024 (signal-leak bias, arXiv:2309.15842) add a signal drawn from the
data; here its mean also depends on the prompt.

The law is linear-Gaussian: low | features ~ N(bias + weight features, covariance). Its marginal at a noise level is
Gaussian too, and known in closed form. Frequencies are those of the DCT, as amplitudes: coefficients over the root of
the number of latents. The first is the mean of a channel, and all are independent of resolution and aspect ratio.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dct import dct, inverse_dct, without_autocast
from .noise import NoiseLevel


@dataclass(frozen=True, eq=False)
class LowFrequencyLaw:
    """N(bias + weight features, covariance) of the lowest k x k frequencies of C channels, D = C k k values.

    Attributes:
        bias: mean amplitudes where the features are 0, shape [C, k, k].
        weight: of the features, shape [D, F]; F is 0 for a law that is the same for every prompt.
        covariance: of the residual, shape [D, D], symmetric and positive semidefinite; zeros for a fixed image.
        bounds: the smallest and largest amplitudes of any image that was fitted, shape [2, C, k, k]. A mean outside of
            them is an extrapolation from unusual prompts, and is clamped.
        noise: standard deviation of the noise kept in these frequencies, relative to sigma. At 1 the marginal is
            exact, which suits a network that weighs the signal in x_T against the prompt. At 0 only x_0 remains, which
            suits a network that takes the signal in x_T literally.
    """

    bias: Tensor
    weight: Tensor
    covariance: Tensor
    bounds: Tensor
    noise: float = 1.0

    @classmethod
    def of_amplitudes(cls, amplitudes: Tensor, noise: float = 1.0) -> "LowFrequencyLaw":
        """The law of images with exactly these amplitudes [C, k, k], for any prompt."""
        size = amplitudes.numel()
        empty = amplitudes.new_zeros(size, 0)
        return cls(amplitudes, empty, amplitudes.new_zeros(size, size), torch.stack([amplitudes, amplitudes]), noise)

    @property
    def channels(self) -> int:
        """Number of latent channels, C."""
        return self.bias.shape[0]

    @property
    def frequencies(self) -> int:
        """Number of frequencies along each side, k."""
        return self.bias.shape[-1]

    @property
    def num_features(self) -> int:
        """Number of features of a prompt, F."""
        return self.weight.shape[1]

    def mean(self, features: Tensor) -> Tensor:
        """Mean amplitudes given the features of prompts [B, F], shape [B, C, k, k]."""
        weight = self.weight.to(features)
        means = self.bias.to(features) + (features @ weight.mT).reshape(-1, *self.bias.shape)
        low, high = self.bounds.to(features)
        return means.clamp(low, high)

    def noisy(self, noise: Tensor, mean: Tensor, level: NoiseLevel) -> Tensor:
        """Convert noise to a sample of x_t at a noise level, for x_0 with this law and no power above its frequencies.

        x_t ~ N(alpha mean, alpha^2 covariance + (noise sigma)^2 I) in the orthonormal coefficients of the low
        frequencies, and N(0, sigma^2 I) in all others. It is a linear map of the noise, so it needs no other random
        numbers, and samples do not depend on each other. At alpha = 0 it returns the noise, bit for bit.

        Args:
            noise: standard normal, shape [B, C, h, w], or of video [B, C, frames, h, w]; the low frequencies of a
                video are those of all its frames.
            mean: amplitudes, shape [B, C, k, k], from `mean`.
            level: of the result, two numbers.

        Returns:
            The shape and dtype of `noise`; the arithmetic is float32 or better.
        """
        alpha, sigma = float(level.alpha), float(level.sigma)
        if alpha == 0:
            return noise if sigma == 1 else sigma * noise
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        with without_autocast(x):
            return (sigma * x + self._change(x, mean, alpha, sigma)).to(noise.dtype)

    def _change(self, noise: Tensor, mean: Tensor, alpha: float, sigma: float) -> Tensor:
        """The part that `noisy` adds to sigma noise."""
        sides = noise.shape[2:]
        signal = alpha * math.sqrt(math.prod(sides))
        frames = (1,) * (len(sides) - 2)
        of_noise = dct(noise, (*frames, self.frequencies, self.frequencies))
        rows, columns = of_noise.shape[-2:]  # fewer than k in a small image
        root = self._root(rows, columns, signal, self.noise * sigma).to(noise)
        drawn = (of_noise.flatten(1) @ root).reshape(of_noise.shape)
        low = drawn + signal * mean[..., :rows, :columns].to(noise).reshape(of_noise.shape)
        return inverse_dct(low - sigma * of_noise, sides)

    def sample(
        self, shape: tuple[int, ...], mean: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_t [B, C, h, w] at a noise level by a generator; see `noisy`."""
        noise = torch.randn(shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.noisy(noise, mean, level)

    def _root(self, rows: int, columns: int, signal: float, sigma: float) -> Tensor:
        """The symmetric root of signal^2 covariance + sigma^2 I over rows x columns frequencies, float64.

        Of all roots, the symmetric one is closest to sigma I, which preserves a seed's image as much as possible.
        """
        kept = torch.zeros(self.bias.shape, dtype=torch.bool)
        kept[:, :rows, :columns] = True
        kept = kept.flatten()
        covariance = self.covariance.cpu().double()[kept][:, kept]
        variances, directions = torch.linalg.eigh(covariance)
        roots = (signal**2 * variances.clamp(min=0) + sigma**2).sqrt()
        return (directions * roots) @ directions.mT

"""The variational bound on the negative log-likelihood of discrete data (Ho et al. 2020, arXiv:2006.11239, eq. 5).

    -log p(x_0)  <=  KL(q(x_T | x_0) || N(0, 1))                              the prior's term
                     + sum over t of E KL(q(x_s | x_t, x_0) || p(x_s | x_t))  that of each step, to s = t - 1
                     - E log p(x_0 | x_1)                                     the decoder's, from the first level

The two Gaussians of a step share one `Update`: their means are keep x_t + gain x_0, one with the data's x_0 and one
with the network's, and their variances do not depend on the sample. So a step costs
offset + weight (x_0 - prediction)^2; with the posterior's own variance the offset is 0 and the weight
(SNR_s - SNR_t) / 2 (Kingma et al. 2021, arXiv:2107.00630, section 4).

Effect of zero terminal SNR:

- The prior's term is exactly 0: x_T is N(0, 1) whatever x_0 is.
- The step from T is finite like any other. Its posterior q(x_s | x_T, x_0) is q(x_s | x_0), its weight SNR_s / 2, and
  its prediction the network's output without any signal, at best the mean of the data. In terms of epsilon it would be
  infinite: x_0 - prediction = sigma / alpha (predicted epsilon - epsilon), a weight of (SNR_s / SNR_t - 1) / 2.
- The decoder depends only on the first two levels.

So the bound is defined for v and x_0 models, but not for epsilon models. The cost of the signal left at T, which an
ordinary schedule has in the prior's term, moves to the step from T.

All terms are nats per element, in the shape of x_0.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import NoiseLevel, Scalar
from .solvers import ddim_update, ddpm_updates


def prior_kl(x_0: Tensor, level: NoiseLevel) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)): information about x_0 that remains in x_T (Ho et al. 2020, eq. 5, L_T).

    (alpha^2 x_0^2 + sigma^2 - 1 - log sigma^2) / 2, with sigma^2 = 1 - alpha^2 put in: as it stands it would leave
    rounding errors of a small alpha, and so it is exactly 0 at alpha = 0.

    Args:
        x_0: clean samples, any shape.
        level: of the last timestep, alpha < 1, numbers or tensors that broadcast to `x_0`.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, prior_kl
        >>> prior_kl(torch.ones(1), NoiseLevel(0.0, 1.0)).item()
        0.0
    """
    signal = torch.as_tensor(level.alpha, dtype=x_0.dtype, device=x_0.device) ** 2
    return (signal * (x_0**2 - 1) - torch.log1p(-signal)) / 2


class StepKL(NamedTuple):
    """Factors of one step's term: offset + weight (x_0 - prediction)^2 nats per element.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import StepKL, step_kl
        >>> step_kl(torch.ones(1), torch.zeros(1), StepKL(offset=0.5, weight=2.0))
        tensor([2.5000])
    """

    offset: Scalar
    weight: Scalar


def step_kl_factors(now: NoiseLevel, following: NoiseLevel, variance_type: str = "fixed_small") -> StepKL:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of an ancestral step, as factors (Ho et al. 2020, eqs. 5 to 8).

    Args:
        now: level of x_t, numbers; alpha may be 0.
        following: level of x_s, numbers with sigma > 0, cleaner than `now`. (To clean data it is the decoder's term.)
        variance_type: of p, as in `ddpm_updates`.

    Raises:
        ValueError: unknown variance type, or `following` not cleaner than `now`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, step_kl_factors
        >>> factors = step_kl_factors(NoiseLevel(0.6, 0.8), NoiseLevel(0.8, 0.6))
        >>> round(factors.weight, 4)
        0.6076
    """
    posterior = ddim_update(now, following, eta=1.0)
    step = ddpm_updates([now, following], variance_type)[0]
    ratio = (posterior.noise / step.noise) ** 2
    return StepKL(offset=(ratio - 1 - math.log(ratio)) / 2, weight=(step.gains[0] / step.noise) ** 2 / 2)


def step_kl(x_0: Tensor, prediction: Tensor, factors: StepKL) -> Tensor:
    """The KL term of one step of the likelihood bound, given the x_0 predicted from x_t; nats per element.

    Args:
        x_0: clean samples, any shape.
        prediction: x_0 as predicted from x_t, same shape.
        factors: of the step, numbers or tensors that broadcast to `x_0`.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import NoiseLevel, step_kl, step_kl_factors
        >>> factors = step_kl_factors(NoiseLevel(0.6, 0.8), NoiseLevel(0.8, 0.6))
        >>> step_kl(torch.ones(1), torch.zeros(1), factors)
        tensor([0.6076])
    """
    return factors.offset + factors.weight * (x_0 - prediction) ** 2


HALF_BIN = 1 / 255
"""Half the distance between neighbors among the 256 values k / 127.5 - 1."""


def decoder_std(first: NoiseLevel, second: NoiseLevel) -> float:
    """Standard deviation of the decoder p(x_0 | x_1), from the two cleanest levels, `first` the cleaner.

    The posterior has no variance at the first timestep. The code of Ho et al. (`GaussianDiffusion2`) takes that of the
    second, for `fixed_large` too, and so do we; sampling itself adds no noise there.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, decoder_std
        >>> round(decoder_std(NoiseLevel(0.9999, 0.0141), NoiseLevel(0.9997, 0.0245)), 4)
        0.0115
    """
    return ddim_update(second, first, eta=1.0).noise


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, std: Scalar) -> Tensor:
    """Log of a Gaussian's mass in the bin of each value; the outermost bins are open (Ho et al. 2020, eq. 13).

    Exact in the tails, where the paper's code approximates the distribution function and stops at 1e-12.

    Args:
        x_0: values k / 127.5 - 1, k from 0 to 255, any shape.
        mean: same shape.
        std: above 0, a number or a tensor that broadcasts to `x_0`.

    Returns:
        float64, at most 0.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import discretized_log_likelihood
        >>> discretized_log_likelihood(torch.zeros(1), torch.zeros(1), std=0.001).exp()
        tensor([0.9999], dtype=torch.float64)
    """
    x_0, mean = x_0.double(), mean.double()
    lower = torch.where(x_0 < HALF_BIN - 1, -math.inf, (x_0 - HALF_BIN - mean) / std)
    upper = torch.where(x_0 > 1 - HALF_BIN, math.inf, (x_0 + HALF_BIN - mean) / std)
    # Mirrored into the lower tail, where the logarithms tell the two edges apart.
    above = lower + upper > 0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    below_lower, below_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return below_upper + torch.log(-torch.expm1(below_lower - below_upper))


def bound_strata(levels: Sequence[NoiseLevel], count: int) -> list[range]:
    """`count` groups of neighboring timesteps whose terms have similar size, to draw one from each.

    The decoder's timestep 0 is a group of its own. The others grow log sigma evenly where they can: -2 log sigma is
    log(1 + SNR), so for data that is N(0, 1) each would have an equal part of the bound, (SNR_s - SNR_t) / (1 + SNR_t)
    summed over its steps.

    Args:
        levels: of all timesteps, the cleanest first, numbers.
        count: from 2 to the number of levels; with this number, every timestep is a group.

    Examples:
        >>> from zsnr_diffusers.core import alpha_bar_table, bound_strata, noise_level
        >>> table = alpha_bar_table()
        >>> bound_strata([noise_level(table, t) for t in range(1000)], 3)
        [range(0, 1), range(1, 28), range(28, 1000)]
    """
    last, steps = len(levels) - 1, count - 1
    growth = torch.tensor([float(level.sigma) for level in levels], dtype=torch.float64).log()
    share = (growth - growth[0]) / (growth[-1] - growth[0])
    number = torch.arange(steps + 1)
    ends = torch.searchsorted(share, number / steps)
    # One timestep at least for each, and enough left for those that come after.
    ends = (ends - number).cummax(dim=0).values + number
    ends = torch.minimum(ends, last - steps + number)
    ends[-1] = last
    return [range(1), *(range(a + 1, b + 1) for a, b in pairwise(ends.tolist()))]

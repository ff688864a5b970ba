"""One update rule for every sampler.

With kappa = alpha / sigma, the reverse process from level t to a cleaner level s with noise eta, a = eta^2, is exactly

    x_s / sigma_s = K x_t / sigma_t + kappa_s^-a integral_{kappa_t}^{kappa_s} (1 + a) kappa^a x_0(kappa) d kappa
                    + sqrt(1 - K^2) w,    K = (kappa_t / kappa_s)^a,    w ~ N(0, 1)

where x_0(kappa) is the network's prediction along the path (Song et al. 2021, arXiv:2011.13456; a = 0 is the
probability-flow ODE, a = 1 the reverse SDE). A sampler is an approximation of x_0(kappa) between its steps. For any
approximation, a step is `x_s = keep x_t + sum_j gains[j] x_0[j] + noise w` over the last few outputs, with factors
that are known before sampling starts. Nothing is divided by alpha_t, so a step may start from pure noise.

This module contains the samplers with constant x_0 within a step; `multistep.py` those with a polynomial through the
last outputs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .choices import check_variance_type
from .noise import NoiseLevel, kappa, transition

CLEAN = NoiseLevel(alpha=1.0, sigma=0.0)
"""Where sampling ends: the data itself."""


class Update(NamedTuple):
    """Factors of one step: x_s = keep * x_t + sum_j gains[j] * x_0[j] + noise * w, with w ~ N(0, 1).

    x_0[0] is the network's prediction from x_t, x_0[1] from the previous sample, and so on.

    Examples:
        >>> from zsnr_diffusers.core import CLEAN, NoiseLevel, ddim_update
        >>> ddim_update(NoiseLevel(0.0, 1.0), CLEAN)
        Update(keep=0.0, gains=(1.0,), noise=0.0)
    """

    keep: float
    gains: tuple[float, ...]
    noise: float


def ddim_update(now: NoiseLevel, following: NoiseLevel, eta: float = 0.0) -> Update:
    """DDIM's step with noise eta (Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16).

    eta = 0 is the probability-flow ODE to first order (DDIM, Euler); eta = 1 is the ancestral step (DDPM's posterior
    with its smaller variance, Euler ancestral). In between, eq. 16 scales the noise by eta itself, unlike the SDE
    above. To `CLEAN` it returns x_0.

    Args:
        now: level of x_t, numbers with sigma > 0; alpha may be 0.
        following: level of x_s, numbers, cleaner than `now`.
        eta: fraction of the posterior's standard deviation to add as noise, in [0, 1].

    Raises:
        ValueError: eta outside [0, 1], or `following` not cleaner than `now`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, ddim_update
        >>> ddim_update(NoiseLevel(0.0, 1.0), NoiseLevel(0.8, 0.6), eta=1.0)
        Update(keep=0.0, gains=(0.8,), noise=0.6)
    """
    check_eta(eta)
    alpha_t, sigma_t, alpha_s, sigma_s = map(float, (*now, *following))
    kept = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # kappa_t / kappa_s: 0 from pure noise and 0 to clean data
    if not 0 <= kept < 1:
        raise ValueError(f"A reverse step must lead to a cleaner level; {following} is not cleaner than {now}.")
    renewed = (1 - kept) * (1 + kept)
    keep = sigma_s / sigma_t * math.sqrt((1 - eta) * (1 + eta) + (eta * kept) ** 2)
    return Update(keep=keep, gains=(alpha_s - keep * alpha_t,), noise=eta * sigma_s * math.sqrt(renewed))


def ddim_updates(path: Sequence[NoiseLevel], eta: float = 0.0) -> list[Update]:
    """All steps of DDIM from the first level of `path`, the noisiest, over the others to clean data.

    Raises:
        ValueError: as `ddim_update`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, ddim_updates
        >>> [update.keep for update in ddim_updates([NoiseLevel(0.0, 1.0), NoiseLevel(0.8, 0.6)])]
        [0.6, 0.0]
    """
    return [ddim_update(now, following, eta) for now, following in pairwise([*path, CLEAN])]


def ddpm_updates(path: Sequence[NoiseLevel], variance_type: str = "fixed_small") -> list[Update]:
    """All ancestral steps of DDPM, with either of the two variances of Ho et al. 2020 (arXiv:2006.11239), section 3.2.

    `fixed_small` is that of the posterior q(x_s | x_t, x_0), eq. 7, correct for single-point data; `fixed_large` is
    beta, that of q(x_t | x_s), correct for data from N(0, 1). Their means are the same. The larger one adds too much
    noise with few steps. To clean data both return x_0.

    Args:
        path: levels from the noisiest on, numbers with sigma > 0.
        variance_type: named as in diffusers.

    Raises:
        ValueError: unknown variance type, or as `ddim_update`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, ddpm_updates
        >>> [round(update.noise, 3) for update in ddpm_updates([NoiseLevel(0.0, 1.0), NoiseLevel(0.8, 0.6)])]
        [0.6, 0.0]
    """
    check_variance_type(variance_type)
    updates = ddim_updates(path, eta=1.0)
    if variance_type == "fixed_large":
        for i, (now, following) in enumerate(pairwise(path)):
            updates[i] = updates[i]._replace(noise=float(transition(following, now).sigma))
    return updates


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm_updates(path: Sequence[NoiseLevel]) -> list[Update]:
    """DDIM's steps with x_0 from the linear multistep weights of Adams and Bashforth, of order 4 from the fourth on.

    Liu et al. 2022 (PNDM, arXiv:2202.09778), eqs. 11 to 13, with weights for even steps regardless of the actual steps
    ("pseudo"). They extrapolate the noise, which would need a division by alpha = 0 at pure noise; here x_0 is
    extrapolated instead. The last step returns x_0.

    Args:
        path: levels from the noisiest on, as in `multistep_updates`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, pndm_updates
        >>> [len(update.gains) for update in pndm_updates([NoiseLevel(0.0, 1.0), NoiseLevel(0.8, 0.6)])]
        [1, 1]
    """
    updates = []
    for i, step in enumerate(ddim_updates(path)):
        weights = _ADAMS_BASHFORTH[min(i, 3) if i + 1 < len(path) else 0]
        updates.append(step._replace(gains=tuple(step.gains[0] * weight for weight in weights)))
    return updates


def consistency_updates(path: Sequence[NoiseLevel]) -> list[Update]:
    """Steps of a consistency model: predict x_0, then add new noise for the next level.

    Song et al. 2023 (arXiv:2303.01469), algorithm 1; Luo et al. 2023 (LCM, arXiv:2310.04378).

    Args:
        path: levels from the noisiest on, as in `multistep_updates`.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, consistency_updates
        >>> consistency_updates([NoiseLevel(0.0, 1.0), NoiseLevel(0.8, 0.6)])
        [Update(keep=0.0, gains=(0.8,), noise=0.6), Update(keep=0.0, gains=(1.0,), noise=0.0)]
    """
    return [Update(keep=0.0, gains=(float(s.alpha),), noise=float(s.sigma)) for s in (*path[1:], CLEAN)]


def inversion_updates(path: Sequence[NoiseLevel]) -> list[Update]:
    """From clean data to noise, so that DDIM's steps over the same levels lead back.

    DDIM's step from a level to the previous, cleaner one uses the output at the noisier level, which is not available
    before the sample there is known. So each step first predicts this sample with the current output, and the next
    step, which has the correct output, corrects it by a difference, like all correctors here. The remaining error of
    the round trip is the difference between the outputs at the predicted and the corrected sample.

    Args:
        path: levels from the cleanest to the noisiest, numbers with sigma > 0. The sample that the first update takes
            is clean, the sample that the last one returns is of the last level.

    Examples:
        >>> from zsnr_diffusers.core import NoiseLevel, inversion_updates
        >>> len(inversion_updates([NoiseLevel(0.8, 0.6), NoiseLevel(0.0, 1.0)]))
        2
    """
    kappas = [kappa(level) for level in path]
    updates = []
    for i, now in enumerate(path):
        ahead = min(i + 1, len(path) - 1)
        behind = kappas[i - 1] - kappas[i] if i > 0 else 0.0
        sigma = float(path[ahead].sigma)
        gains = [-sigma * (behind + kappas[i] - kappas[ahead]), sigma * behind][: i + 1]
        keep = sigma / now.sigma
        if i == 0:  # x_t = alpha x_0 + sigma noise; the network's input was the clean sample instead of x_t
            gains[0] -= keep * now.alpha
            keep *= 1 + now.alpha
        updates.append(Update(keep=float(keep), gains=tuple(map(float, gains)), noise=0.0))
    return updates


def check_eta(eta: float) -> None:
    """Refuse a sampler's eta, the fraction of added noise, outside [0, 1].

    Raises:
        ValueError: with the value and the meaning of the ends.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is the deterministic DDIM, 1 is DDPM.")

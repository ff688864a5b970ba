"""One reverse step, from a noise level to a cleaner one.

With kappa = alpha / sigma the reverse process is d(x / sigma) / d kappa = x_0, and a first-order step holds x_0 fixed.
Every such step is `x_s = keep x_t + gain x_0 + noise w`: once the fresh noise is chosen, `keep` follows from the
variance that x_s must have, and `gain` from its mean. Nothing is divided by alpha_t, so a step may start from pure
noise, and what stands under a root is made of non-negative numbers, so no rounding can make it imaginary.
"""

import math
from typing import NamedTuple

from .noise import NoiseLevel

CLEAN = NoiseLevel(alpha=1.0, sigma=0.0)
"""Where sampling ends: the data itself."""


class Update(NamedTuple):
    """Factors of one step: x_s = keep * x_t + gain * x_0 + noise * w, with w ~ N(0, 1)."""

    keep: float
    gain: float
    noise: float


def ddim_update(now: NoiseLevel, following: NoiseLevel, eta: float = 0.0) -> Update:
    """DDIM's step with noise eta (Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16).

    eta = 0 is the probability-flow ODE to first order (DDIM, Euler); eta = 1 is the ancestral step (DDPM's posterior
    with its smaller variance, Euler ancestral). To `CLEAN` it returns x_0.

    Args:
        now: level of x_t, numbers with sigma > 0; alpha may be 0.
        following: level of x_s, numbers, cleaner than `now`.
        eta: share of the posterior's standard deviation that is fresh noise, in [0, 1].

    Raises:
        ValueError: eta outside [0, 1], or `following` not cleaner than `now`.
    """
    check_eta(eta)
    alpha_t, sigma_t, alpha_s, sigma_s = map(float, (*now, *following))
    kept = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # kappa_t / kappa_s: 0 from pure noise and 0 to clean data
    if not 0 <= kept < 1:
        raise ValueError(f"A reverse step must lead to a cleaner level; {following} is not cleaner than {now}.")
    renewed = (1 - kept) * (1 + kept)
    keep = sigma_s / sigma_t * math.sqrt((1 - eta) * (1 + eta) + (eta * kept) ** 2)
    return Update(keep=keep, gain=alpha_s - keep * alpha_t, noise=eta * sigma_s * math.sqrt(renewed))


def check_eta(eta: float) -> None:
    """Refuse an eta outside [0, 1].

    Raises:
        ValueError: with the value and the meaning of the ends.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is the deterministic DDIM, 1 is DDPM.")

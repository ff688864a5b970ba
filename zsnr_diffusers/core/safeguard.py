"""How far a sampler may trust that outputs go on as they did: what keeps high order stable under guidance.

Without guidance x_0 is the mean of the data given the sample, and such means are a martingale: what the network will
say of a cleaner sample is on average what it says now. So the projection of an output on the one before it,
<x_0, previous> / <previous, previous>, is about 1 or more. Guidance, u + w (c - u), drives samples past that: outputs
overshoot while the two conditions disagree and fall back where they agree. The equation is stiff there, and weights
that extrapolate amplify what falls back. A projection below 1 tells that, without a further network call and without
anybody saying w.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HELD = 0.9
"""The projection that is as good as 1: without guidance some images fall as low by chance."""


class Safeguard(NamedTuple):
    """What a step of the ODE may leave out; its high order is a sum of differences to the newest output."""

    newest: float
    """The gain that order 1 with corrector has for the newest output."""
    extrapolated: tuple[float, ...]
    """What the gains of the older outputs have beyond those of order 1 with corrector; that of the newest is -sum."""
    interval: float
    """The length of the step in `position`."""


def projection(x_0: Tensor, previous: Tensor) -> Tensor:
    """<x_0, previous> / <previous, previous> of each sample; 1 where the previous output is 0.

    Args:
        x_0: the newest output, shape [B, ...].
        previous: the output one step before, same shape.

    Returns:
        Shape [B, 1, ...].
    """
    new, old = x_0.reshape(len(x_0), -1), previous.reshape(len(x_0), -1)
    held: Tensor = torch.linalg.vecdot(new, old) / torch.linalg.vecdot(old, old)
    return held.nan_to_num(nan=1.0).reshape(-1, *[1] * (x_0.ndim - 1))


def untrusted(held: Tensor, interval: float) -> Tensor:
    """The share to leave out of what makes a step one of high order (`Safeguard.extrapolated`).

    h (`HELD` - p), within [0, 1]: over long steps a fall does more harm. Since p tends to 1 as steps get shorter, the
    order of convergence stays.

    Args:
        held: p, the smallest `projection` of the run so far: a path that was stiff once is not trusted again.
        interval: h, the length of the step in `position`.
    """
    return ((HELD - held) * interval).clamp(0, 1)


def delayed(held: Tensor) -> Tensor:
    """The share of the newest output to take from the one before.

    Outputs that change their sign, p < 0, swing around what they lead to. For x_0 = p previous that is 0, which is
    the mean of the two with the weights 1 and -p (Wegstein 1958, doi:10.1145/368861.368871). Never more than half.
    """
    swing = -held.clamp(max=0)
    return (swing / (1 + swing)).clamp(max=0.5)


def corrections(held: Tensor, safeguard: Safeguard) -> list[Tensor]:
    """The gains of (newest output - older output), for each older one, that take out of a step what is not trusted.

    Args:
        held: the smallest `projection` of the run so far, shape [B, 1, ...].
        safeguard: of the step.
    """
    share, (last, *others) = untrusted(held, safeguard.interval), safeguard.extrapolated
    return [share * (last - safeguard.newest * delayed(held)), *(share * gain for gain in others)]

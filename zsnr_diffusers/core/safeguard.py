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

HELD = 0.8
"""The projection that is as good as 1: without guidance some images fall as low by chance."""
LONGEST = 2.0
"""The step, in `position`, over which high order is not trusted whatever the outputs say; three steps have longer."""


class Safeguard(NamedTuple):
    """What a step falls back to where its high order is not trusted."""

    low: tuple[float, float]
    """Gains of the newest output and of the one before, of order 1 with corrector."""
    high: tuple[float, ...]
    """Gains of the step itself, newest output first."""
    interval: float
    """The length of the step in `position`."""


def output_projection(x_0: Tensor, previous: Tensor) -> Tensor:
    """<x_0, previous> / <previous, previous> of each sample's last two outputs; 1 where the previous output is 0.

    Args:
        x_0: the newest output, shape [B, ...].
        previous: the output one step before, same shape.

    Returns:
        Shape [B, 1, ...].
    """
    new, old = x_0.reshape(len(x_0), -1), previous.reshape(len(x_0), -1)
    held: Tensor = torch.linalg.vecdot(new, old) / torch.linalg.vecdot(old, old)
    return held.nan_to_num(nan=1.0).reshape(-1, *[1] * (x_0.ndim - 1))


def low_order_share(held: Tensor, interval: float) -> Tensor:
    """The share of a sampling step taken at low order: h (1 - p / `HELD`) + (h / `LONGEST`)^4, within [0, 1].

    Over long steps a fall does more harm, and over the longest, those of a run of three or four, a line through two
    outputs says little of where they lead. Since p tends to 1 and h to 0 as steps get shorter, the order of
    convergence stays.

    Args:
        held: p, the smallest `output_projection` of the run so far: a path that was stiff once is not trusted again.
        interval: h, the length of the step in `position`.
    """
    return ((interval + (interval / LONGEST) ** 4) - held * (interval / HELD)).clamp(0, 1)


def previous_output_share(held: Tensor) -> Tensor:
    """The share of the newest output's gain to move to the output before it, which damps outputs that change sign.

    Outputs that change their sign, p < 0, swing around what they lead to. For x_0 = p previous that is 0, which is
    the mean of the two with the weights 1 and -p (Wegstein 1958, doi:10.1145/368861.368871). Never more than half.

    Args:
        held: p, the smallest `output_projection` of the run so far: what swung once is damped to the end.
    """
    swing = held.clamp(-1, 0)
    return swing / (swing - 1)


def gain_corrections(held: Tensor, safeguard: Safeguard) -> list[Tensor]:
    """What to add to each output's gain, newest first, to lower a step's order where high order is not trusted.

    Their sum is zero: whatever is constant in the outputs, such as the brightness that they agree on, stays exact.

    Args:
        held: the smallest `output_projection` of the run so far, shape [B, 1, ...].
        safeguard: of the step.

    Returns:
        Tensors of the same shape, as many as the step has outputs; zero where high order is trusted.
    """
    share, (newest, older) = low_order_share(held, safeguard.interval), safeguard.low
    moved = newest * previous_output_share(held)
    low = newest - moved, older + moved
    changes = [share * (gain - high) for gain, high in zip(low, safeguard.high, strict=False)]
    return [*changes, *(share * -high for high in safeguard.high[len(low) :])]

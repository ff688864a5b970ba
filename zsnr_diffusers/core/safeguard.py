"""Reduce the order of a sampler when outputs reverse, which keeps high order stable under guidance.

Without guidance x_0 is the mean of the data given the sample, and such means are a martingale: the output for a
cleaner sample equals the current one on average. So the projection of an output on the one before it, <x_0, previous>
/ <previous, previous>, is about 1 or more. Guidance, u + w (c - u), makes outputs overshoot while the two predictions
disagree, and reverse when they agree. There the equation is stiff, and extrapolating weights amplify the reversal. A
projection below 1 detects this, without additional network calls and without knowing w.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HELD = 0.8
"""Projections above this count as 1: without guidance, some images reach it by chance."""
LONGEST = 2.0
"""Above this step length in `position`, high order is never used; runs of three steps have longer ones."""


class Safeguard(NamedTuple):
    """The alternatives of lower order of a step."""

    low: tuple[float, float]
    """Gains of the newest output and of the one before, of order 1 with corrector."""
    middle: tuple[float, ...] | None
    """Gains of order 2 if the step itself is of order 3, newest output first, as many as `high` has."""
    high: tuple[float, ...]
    """Gains of the step itself, newest output first."""
    interval: float
    """The length of the step in `position`."""


def output_projection(x_0: Tensor, previous: Tensor) -> Tensor:
    """<x_0, previous> / <previous, previous> of each sample's last two outputs; 1 if the previous output is 0.

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
    """The fraction of low order in a sampling step: h (1 - p / `HELD`) + (h / `LONGEST`)^4, within [0, 1].

    Reversals are more harmful in long steps, and in the longest, with three or four steps in total, a line through two
    outputs is a poor extrapolation. Since p tends to 1 and h to 0 with shorter steps, the order of convergence is
    preserved.

    Args:
        held: p, the smallest `output_projection` of the run so far: the order stays reduced after a reversal.
        interval: h, the length of the step in `position`.
    """
    return ((interval + (interval / LONGEST) ** 4) - held * (interval / HELD)).clamp(0, 1)


def middle_order_share(held: Tensor) -> Tensor:
    """The fraction of order 2 in a step of order 3: 1 - p / `HELD`, within [0, 1].

    Order 3 amplifies reversals more than order 2, also in short steps.

    Args:
        held: p, the smallest `output_projection` of the run so far.
    """
    return (1 - held / HELD).clamp(0, 1)


def previous_output_share(held: Tensor) -> Tensor:
    """The fraction of the newest output's gain to move to the previous output, which damps outputs that change sign.

    Outputs that change sign, p < 0, oscillate around their limit. For x_0 = p previous the limit is 0, the mean of the
    two with weights 1 and -p (Wegstein 1958, doi:10.1145/368861.368871). At most one half.

    Args:
        held: p, the smallest `output_projection` of the run so far: damping continues to the end of the run.
    """
    swing = held.clamp(-1, 0)
    return swing / (swing - 1)


def safeguarded_gains(held: Tensor, safeguard: Safeguard) -> list[Tensor]:
    """Gains of each output, newest first, of an order that is reduced where outputs reverse.

    Their sum is that of the step's own gains, so constant components of the outputs, such as a common brightness, stay
    exact.

    Args:
        held: the smallest `output_projection` of the run so far, shape [B, 1, ...].
        safeguard: of the step.

    Returns:
        Tensors of the same shape, as many as the step has outputs; the step's own gains where nothing reverses.
    """
    newest, older = safeguard.low
    moved = newest * previous_output_share(held)
    low: list[float | Tensor] = [newest - moved, older + moved, *[0.0] * (len(safeguard.high) - 2)]
    high: Sequence[float | Tensor] = safeguard.high
    if safeguard.middle is not None:
        high = _blend(high, safeguard.middle, middle_order_share(held))
    return _blend(high, low, low_order_share(held, safeguard.interval))


def _blend(gains: Sequence[float | Tensor], others: Sequence[float | Tensor], share: Tensor) -> list[Tensor]:
    """A fraction `share` of `others`, and the rest of `gains`."""
    return [gain + share * (other - gain) for gain, other in zip(gains, others, strict=True)]

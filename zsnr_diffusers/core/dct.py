"""The lowest frequencies of the discrete cosine transform (DCT-II) of the last axes of a tensor.

Unlike a Fourier transform it does not wrap around, so an image that is bright at the top and dark at the bottom has no
discontinuity (Ahmed, Natarajan & Rao 1974, doi:10.1109/T-C.1974.223784).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dct_basis(side: int, k: int, like: Tensor) -> Tensor:
    """The first k rows of the orthonormal DCT-II of `side` values, shape [min(k, side), side].

    Row i has i half cycles over the side.

    Args:
        side: number of values.
        k: number of frequencies.
        like: a tensor with the dtype and device of the result.
    """
    frequency = torch.arange(min(k, side), device=like.device)
    place = 2 * torch.arange(side, device=like.device) + 1
    # Multiples of the period are removed as integers: the remainder is small, and exact in every dtype.
    turns = (frequency[:, None] * place) % (4 * side)
    rows = (turns.to(like.dtype) * (math.pi / (2 * side))).cos() * math.sqrt(2 / side)
    rows[0] = math.sqrt(1 / side)
    return rows


def dct(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The lowest orthonormal DCT coefficients over the last axes of x, at most `counts[i]` of each.

    Args:
        x: shape [..., n_1, ..., n_m], floating point.
        counts: m numbers of frequencies.

    Returns:
        Shape [..., min(counts[0], n_1), ..., min(counts[-1], n_m)].
    """
    first = x.ndim - len(counts)
    for axis, count in enumerate(counts, first):
        x = torch.tensordot(x, dct_basis(x.shape[axis], count, x), dims=([axis], [1])).movedim(-1, axis)
    return x


def inverse_dct(coefficients: Tensor, sides: Sequence[int]) -> Tensor:
    """The tensor with these lowest DCT coefficients and no others, the transpose of `dct`.

    Args:
        coefficients: shape [..., k_1, ..., k_m], each k at most the side of its axis.
        sides: m lengths of axes.

    Returns:
        Shape [..., sides[0], ..., sides[-1]].
    """
    first = coefficients.ndim - len(sides)
    for axis, side in enumerate(sides, first):
        basis = dct_basis(side, coefficients.shape[axis], coefficients)
        coefficients = torch.tensordot(coefficients, basis, dims=([axis], [0])).movedim(-1, axis)
    return coefficients


def without_autocast(x: Tensor) -> torch.autocast:
    """A context that prevents autocast from rounding matrix products of tensors like x to half precision."""
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    return torch.autocast(device, enabled=False)

"""Guidance that keeps the lowest frequencies of the conditional prediction.

Guidance extrapolates from one prediction through another. At a signal-to-noise ratio of 0, predictions are means of
the images given the prompt, so guidance extrapolates brightness and color, and images become too dark or too bright
for their prompt. Detail, the purpose of guidance, is in the higher frequencies.
"""

import torch
from torch import Tensor

from .choices import check_keep_low_frequencies
from .dct import dct, inverse_dct, without_autocast
from .guidance import classifier_free_guidance, rescale_guidance


def keep_low_frequencies(guided: Tensor, conditional: Tensor, k: int) -> Tensor:
    """Replace the lowest k x k frequencies of the guided prediction by those of the conditional one.

    guided - P(guided - conditional), with P the orthogonal projection of `low_pass`. Sadat et al. 2025
    (arXiv:2506.19713) likewise guide low frequencies less than high ones, there with two scales and a Laplacian
    pyramid.

    Given x_t, predictions of noise, v, x_0 and flow are affine in each other with one factor per sample. In the
    difference x_t cancels, and P is linear, so the result means the same image whatever the network predicts.

    Args:
        guided: prediction after guidance, shape [B, C, H, W]; or any [B, ..., H, W], such as the frames of a video,
            which are processed independently.
        conditional: conditional prediction, same shape.
        k: number of frequencies to keep per side, in half cycles per image from 0. 0 is off and returns `guided`
            itself, 1 keeps the mean of each channel, and k of at least the larger side returns `conditional`.

    Returns:
        Tensor of that shape in the dtype of `guided`; the arithmetic is float32 or better.

    Raises:
        ValueError: k is negative or not an integer; predictions without height and width, such as packed tokens.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import keep_low_frequencies
        >>> guided, conditional = torch.full((1, 1, 8, 8), 3.0), torch.ones(1, 1, 8, 8)
        >>> keep_low_frequencies(guided, conditional, k=1).mean()
        tensor(1.0000)
    """
    check_keep_low_frequencies(k)
    if k == 0:
        return guided
    if guided.ndim < 4:
        raise ValueError(no_height_and_width(k, guided.shape))
    if k >= max(guided.shape[-2:]):
        return conditional.to(guided.dtype)
    wide = torch.promote_types(guided.dtype, torch.float32)
    difference = guided.to(wide) - conditional.to(wide)
    return (guided.to(wide) - low_pass(difference, k)).to(guided.dtype)


def guided_prediction(
    unconditional: Tensor,
    conditional: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    keep_low: int = 0,
) -> Tensor:
    """Classifier-free guidance, its rescale, and the kept low frequencies, in the order of `enable_guidance_rescale`.

    Args:
        unconditional: prediction without the condition, shape [B, C, H, W].
        conditional: prediction with it, same shape.
        guidance_scale: w in u + w (c - u).
        guidance_rescale: phi of Lin et al. 2023, Algorithm 2.
        keep_low: k of `keep_low_frequencies`.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import guided_prediction
        >>> guided_prediction(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), guidance_scale=3.0).mean()
        tensor(-2.)
    """
    guided = classifier_free_guidance(unconditional, conditional, guidance_scale)
    guided = rescale_guidance(guided, conditional, guidance_rescale)
    return keep_low_frequencies(guided, conditional, keep_low)


def low_pass(x: Tensor, k: int) -> Tensor:
    """The lowest k x k frequencies of images [..., H, W]: an orthogonal projection on the first vectors of a DCT.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers.core import low_pass
        >>> low_pass(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), k=1)
        tensor([[4.0000, 4.0000],
                [4.0000, 4.0000]])
    """
    with without_autocast(x):
        return inverse_dct(dct(x, (k, k)), x.shape[-2:])


def no_height_and_width(k: int, shape: tuple[int, ...]) -> str:
    """Message for predictions of which the last two dimensions are not height and width."""
    return (
        f"keep_low_frequencies={k} needs predictions [..., H, W], but got {list(shape)}: tokens, channels-last "
        "tensors and sound do not end with height and width. Pass keep_low_frequencies=0 for this pipeline; in your "
        "own sampling loop, unpack the predictions first."
    )

"""The network of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B), as settings of a plain `UNet2DModel`.

`UNet2DModel` contains all its parts, but its defaults belong to another network. The correspondence is:

| the paper's network | in `UNet2DModel` | settings |
|---|---|---|
| sinusoid [sin, cos], ch numbers, frequencies 1 to 1/10000 | `time_proj` | `flip_sin_to_cos=False`, `freq_shift=1` |
| then dense to 4 ch, swish, dense | `time_embedding` | |
| swish | SiLU, everywhere | `act_fn="silu"` |
| group normalisation | `GroupNorm` | `norm_num_groups=32`, `norm_eps=1e-6` |
| residual block: norm, swish, conv; + dense(swish(time)); norm, swish, dropout, conv | `ResnetBlock2D` | `dropout` |
| its 1x1 shortcut, where channels differ | `conv_shortcut` | |
| self-attention, one head of all channels, at 16x16 | `Attention` | `attention_head_dim=None`, block types |
| downsampling: conv of stride 2, padded right and below (SAME) | `Downsample2D` | `downsample_padding=0` |
| downsampling by average pooling: in the paper's code, in none of its runs | no such block | |
| upsampling: each pixel four times (nearest), then conv | `Upsample2D` | |
| main path down: per level 2 residual blocks, then downsampling | `down_blocks` | `layers_per_block=2` |
| middle: residual block, self-attention, residual block | `UNetMidBlock2D` | |
| main path up: per level 3 residual blocks, each with a skip connection from the way down | `up_blocks` | |

The initialization is also the paper's, unlike that of `UNet2DModel`: see `build_unet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def _ddpm_unet_config(
    sample_size: int, channels: tuple[int, ...], groups: int, attention: int, dropout: float
) -> dict[str, Any]:
    """Config of DDPM's UNet, with self-attention where feature maps are `attention` pixels wide."""
    attends = [sample_size >> level == attention for level in range(len(channels))]
    return {
        "sample_size": sample_size,
        "block_out_channels": channels,
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        "layers_per_block": 2,
        "dropout": dropout,
        "norm_num_groups": groups,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "silu",
    }


_LSUN = _ddpm_unet_config(256, (128, 128, 256, 256, 512, 512), groups=32, attention=16, dropout=0.0)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ddpm-cifar10": _ddpm_unet_config(32, (128, 256, 256, 256), groups=32, attention=16, dropout=0.1),
    "ddpm-lsun": _LSUN,
    "ddpm-celebahq": _LSUN,
    "ddpm-lsun-large": _ddpm_unet_config(256, (192, 192, 384, 384, 768, 768), groups=32, attention=16, dropout=0.0),
    # At least four channels per group, as in the paper: with fewer, normalization removes most of a small image.
    "small-8": _ddpm_unet_config(8, (32, 64), groups=8, attention=4, dropout=0.1),
    "small-16": _ddpm_unet_config(16, (32, 64, 64), groups=8, attention=8, dropout=0.1),
    "small-32": _ddpm_unet_config(32, (32, 64, 64, 64), groups=8, attention=16, dropout=0.1),
}
"""Configs of `UNet2DModel` by name: the paper's networks, and small ones for 8, 16 and 32 pixels."""


def build_unet(name: str, class_labels: int | None = None, **changes: Any) -> UNet2DModel:
    """A pixel-space network from a preset, with the initialization of Ho et al. 2020.

    Xavier-uniform convolutions and dense layers, biases of zero; a gain of 1e-5 where a residual block or attention
    joins the main path and in the last convolution (variance scaling of 1e-10 in the paper's code), so that the
    untrained network's blocks are close to the identity, and its output is 0. Weights are drawn from torch's global
    generator, as in any module: call `torch.manual_seed` before.

    Args:
        name: `ddpm-cifar10` (32 pixels, 35.7M parameters), `ddpm-lsun` or `ddpm-celebahq` (256, 113.7M),
            `ddpm-lsun-large` (256, 255.7M), `small-8`, `small-16` or `small-32`.
        class_labels: N classes, labeled 0 to N - 1; label N means no class, as in `ClassConditionalPipeline`. None for
            a network without classes.
        changes: other values for `UNet2DModel`'s arguments (`sample_size`, `in_channels`, `out_channels`, `dropout`
            ...). Attention stays at its level when `sample_size` changes.

    Returns:
        A `UNet2DModel`, of [B, in_channels, H, W] to [B, out_channels, H, W].

    Raises:
        ValueError: an unknown name, fewer than one class, a `sample_size` that cannot be halved at every level, or
            `num_class_embeds` among the changes.

    Examples:
        >>> from zsnr_diffusers import build_unet
        >>> unet = build_unet("small-8", class_labels=10)
        >>> unet.config.num_class_embeds
        11
    """
    from diffusers import UNet2DModel  # command-line help lists presets without importing torch

    if name not in PRESETS:
        raise ValueError(f"name={name!r} is not a preset; choose one of {', '.join(PRESETS)}.")
    if "num_class_embeds" in changes:
        raise ValueError(
            "num_class_embeds follows from class_labels, plus one for no class: pass class_labels instead."
        )
    if class_labels is not None and class_labels < 1:
        raise ValueError(f"class_labels={class_labels} must be at least 1; omit it for a network without classes.")
    config = {**PRESETS[name], **changes}
    _check_sample_size(config["sample_size"], len(config["block_out_channels"]))
    unet = UNet2DModel(**config, num_class_embeds=None if class_labels is None else class_labels + 1)
    _initialize_weights(unet)
    return unet


def _check_sample_size(sample_size: int | tuple[int, int], levels: int) -> None:
    """Refuse an image size that the UNet's levels cannot halve, since skip connections would not match."""
    unit = 2 ** (levels - 1)
    for side in (sample_size,) if isinstance(sample_size, int) else sample_size:
        if side < unit or side % unit:
            raise ValueError(
                f"sample_size={sample_size} must be a multiple of {unit} for {levels} levels: pad or resize the "
                "images, or use a preset with fewer levels."
            )


_QUIET = ("conv2", "to_out.0", "conv_out")
"""Last layers of residual blocks, attention and the network, by name suffix."""

_CLASS_STD = 0.24
"""The root mean square of the time embedding with these weights, at any width and timestep.

The sinusoid has a mean square of 1/2 for all t; the first dense layer with Xavier initialization makes it 1/5, swish
0.056, and the second dense layer keeps it. A class embedding with PyTorch's N(0, 1) would dominate it.
"""


def _initialize_weights(unet: UNet2DModel) -> None:
    """Initialize as in Ho et al. 2020; group normalization keeps PyTorch's 1 and 0."""
    from torch import nn  # its initializers record no gradients

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=1e-5 if name.endswith(_QUIET) else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(unet.class_embedding, nn.Embedding):
        nn.init.normal_(unet.class_embedding.weight, std=_CLASS_STD)

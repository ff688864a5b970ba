"""Stable Diffusion and Stable Diffusion XL that follow an image: ControlNets and adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    ModelMixin,
    T2IAdapter,
    UNet2DConditionModel,
)

from .parts import LATENT_SIZE, SIZE, Small, given, small, unet
from .stable_diffusion_xl import xl_unet

_EMBEDDING = {"conditioning_embedding_out_channels": (4, 8, 8)}  # each but the first halves the resolution


def controlnet(
    build_unet: Callable[[], UNet2DConditionModel], kind: type[ModelMixin] = ControlNetModel, **changes: Any
) -> ModelMixin:
    """For such a UNet. It adds nothing, as any that is untrained: it ends in zeros."""
    return kind(**given(kind.__init__, build_unet().config, {**_EMBEDDING, **changes}))


def _xs(build_unet: Callable[[], UNet2DConditionModel]) -> ControlNetXSAdapter:
    return ControlNetXSAdapter.from_unet(build_unet(), size_ratio=1.0, **_EMBEDDING)


def _adapter() -> T2IAdapter:
    return T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=SIZE // LATENT_SIZE)


_UNION = partial(controlnet, xl_unet, ControlNetUnionModel, num_trans_channel=8, num_trans_head=2, num_proj_channel=8)

# ControlNet-XS has two layers in each block; an adapter acts where there is attention.
_XS_UNET = partial(unet, layers_per_block=2)
_XL_XS_UNET = partial(xl_unet, layers_per_block=2)
_XL_ADAPTED_UNET = partial(
    xl_unet, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
)

_COMPONENTS: dict[str, dict[str, Any]] = {
    "StableDiffusionControlNetXSPipeline": {"unet": _XS_UNET, "controlnet": partial(_xs, _XS_UNET)},
    "StableDiffusionXLControlNetXSPipeline": {"unet": _XL_XS_UNET, "controlnet": partial(_xs, _XL_XS_UNET)},
    "StableDiffusionAdapterPipeline": {"adapter": _adapter},
    "StableDiffusionXLAdapterPipeline": {"unet": _XL_ADAPTED_UNET, "adapter": _adapter},
}

_PLAIN = (
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
)

_XL = (
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
)

_XL_UNION = (
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)

PIPELINES: dict[str, Small] = {
    **{name: small(name, {"controlnet": partial(controlnet, unet)}) for name in _PLAIN},
    **{name: small(name, {"unet": xl_unet, "controlnet": partial(controlnet, xl_unet)}) for name in _XL},
    **{name: small(name, {"unet": xl_unet, "controlnet": _UNION}, control_mode=0) for name in _XL_UNION},
    **{name: small(name, components) for name, components in _COMPONENTS.items()},
}
"""By the name of the class."""

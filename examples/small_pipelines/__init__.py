"""Every UNet pipeline of diffusers that has classifier-free guidance, from small components with random weights.

What a fix does to one pipeline says little about the next: they stack, split and combine their predictions in ways of
their own. So here each is the real class with real components of a few thousand weights, ready to be called.
"""

import diffusers

from . import (
    audio,
    chroma,
    controlnet,
    cosmos,
    deepfloyd,
    flux,
    hunyuan,
    kandinsky,
    ltx,
    lumina,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unclip,
    video,
    wan,
    z_image,
)
from .parts import Small

_FAMILIES = (stable_diffusion, stable_diffusion_xl, controlnet, deepfloyd, kandinsky, unclip, video, audio)

PIPELINES: dict[str, Small] = {
    name: small for family in _FAMILIES for name, small in family.PIPELINES.items() if hasattr(diffusers, name)
}
"""By the name of the class; those that the installed diffusers has."""

_FLOW_FAMILIES = (stable_diffusion_3, flux, qwen_image, sana, wan, ltx, lumina, chroma, z_image, hunyuan, cosmos)

FLOW_PIPELINES: dict[str, Small] = {
    name: small for family in _FLOW_FAMILIES for name, small in family.PIPELINES.items() if hasattr(diffusers, name)
}
"""The same of pipelines whose scheduler is one of flow matching, and of others that denoise by a transformer."""

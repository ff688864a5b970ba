"""Pipelines of diffusers from small components with random weights: UNets with guidance, and all of flow matching.

What a fix does to one pipeline says little about the next: they stack, split and combine their predictions in ways of
their own. So here each is the real class with real components of a few thousand weights, ready to be called.
"""

import diffusers

from . import (
    audio,
    bria,
    chroma,
    cog_video,
    controlnet,
    cosmos,
    deepfloyd,
    diffusion_transformers,
    dream_lite,
    flow_audio,
    flux,
    flux2,
    glm,
    hunyuan,
    kandinsky,
    kandinsky_5,
    kandinsky_6,
    ltx,
    ltx2,
    lumina,
    made_of_wan,
    motif,
    qwen_image,
    read_by_qwen,
    sana,
    sana_video,
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

_FLOW_FAMILIES = (
    stable_diffusion_3,
    flux,
    flux2,
    qwen_image,
    read_by_qwen,
    z_image,
    chroma,
    lumina,
    bria,
    glm,
    sana,
    sana_video,
    wan,
    made_of_wan,
    ltx,
    ltx2,
    hunyuan,
    cosmos,
    kandinsky_5,
    kandinsky_6,
    motif,
    flow_audio,
    dream_lite,
)

FLOW_PIPELINES: dict[str, Small] = {
    name: small for family in _FLOW_FAMILIES for name, small in family.PIPELINES.items() if hasattr(diffusers, name)
}
"""The same of pipelines that sample along a flow, whether or not they guide; nearly all denoise by a transformer."""

TRANSFORMER_PIPELINES: dict[str, Small] = {
    name: small
    for family in (diffusion_transformers, cog_video)
    for name, small in family.PIPELINES.items()
    if hasattr(diffusers, name)
}
"""The same of pipelines that denoise by a transformer along a schedule of betas, or of sigmas without a flow."""

NOT_BUILT = {
    "Cosmos2_5_TransferPipeline": "its ControlNet needs torchvision",
    "EasyAnimateControlPipeline": "a call fails: it gives `encode_prompt` an argument that this does not take",
    "LTX2VideoDiffusionDecodePipeline": "its scheduler is never asked: the decoder takes steps of its own",
    "OmniGenPipeline": "it needs torchvision to read images",
}
"""Pipelines that sample along a flow and are not among `FLOW_PIPELINES`, and why."""

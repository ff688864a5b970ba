"""Pipelines of diffusers from small components with random weights: UNets with guidance, and all of flow matching.

What a fix does to one pipeline says little about the next: they stack, split and combine their predictions in ways of
their own. So here each is the real class with real components of a few thousand weights, ready to be called.
"""

from types import ModuleType

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


def _gathered(*families: ModuleType) -> dict[str, Small]:
    return {name: small for family in families for name, small in family.PIPELINES.items() if _is_here(name)}


def _is_here(name: str) -> bool:
    if name == "WanVACEPipeline" and diffusers.__version__.startswith("0.35."):
        return False  # there it takes no embeddings, and cleans texts by a package more
    try:
        return hasattr(diffusers, name)
    except RuntimeError:  # its module needs a package that is not there
        return False


PIPELINES = _gathered(*_FAMILIES)
"""By the name of the class; those that the installed diffusers has."""

FLOW_PIPELINES: dict[str, Small]
"""The same of pipelines that sample along a flow, whether or not they guide; nearly all denoise by a transformer."""

TRANSFORMER_PIPELINES: dict[str, Small]
"""The same of pipelines that denoise by a transformer along a schedule of betas, or of sigmas without a flow."""

NOT_BUILT = {
    "Cosmos2_5_TransferPipeline": "its ControlNet needs torchvision",
    "EasyAnimateControlPipeline": "a call fails: it gives `encode_prompt` an argument that this does not take",
    "LTX2VideoDiffusionDecodePipeline": "its scheduler is never asked: the decoder takes steps of its own",
    "OmniGenPipeline": "it needs torchvision to read images",
}
"""Pipelines that sample along a flow and are not among `FLOW_PIPELINES`, and why."""

_LATER = {"FLOW_PIPELINES": _FLOW_FAMILIES, "TRANSFORMER_PIPELINES": (diffusion_transformers, cog_video)}


def __getattr__(name: str) -> dict[str, Small]:
    """What is gathered when it is first asked for, since diffusers and transformers then import very much."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _gathered(*_LATER[name])
    return globals()[name]

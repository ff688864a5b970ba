"""Every UNet pipeline of diffusers that has classifier-free guidance, from small components with random weights.

What a fix does to one pipeline says little about the next: they stack, split and combine their predictions in ways of
their own. So here each is the real class with real components of a few thousand weights, ready to be called.
"""

import diffusers

from . import audio, controlnet, deepfloyd, kandinsky, stable_diffusion, stable_diffusion_xl, unclip, video
from .parts import Small

_FAMILIES = (stable_diffusion, stable_diffusion_xl, controlnet, deepfloyd, kandinsky, unclip, video, audio)

PIPELINES: dict[str, Small] = {
    name: small for family in _FAMILIES for name, small in family.PIPELINES.items() if hasattr(diffusers, name)
}
"""By the name of the class; those that the installed diffusers has."""

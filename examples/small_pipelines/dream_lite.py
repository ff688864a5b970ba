"""DreamLite: flow matching by a UNet."""

from .flow_parts import flow
from .parts import Small
from .stable_diffusion_xl import DREAMLITE
from .stable_diffusion_xl import PIPELINES as _WITH_GUIDANCE

PIPELINES: dict[str, Small] = {
    "DreamLitePipeline": _WITH_GUIDANCE["DreamLitePipeline"],
    "DreamLiteMobilePipeline": flow(
        "DreamLiteMobilePipeline",
        DREAMLITE,
        {"image": None, "max_sequence_length": 200},
        guidance="none",
        denoisers=("unet",),
    ),
}
"""By the name of the class."""

"""Pipelines out of folders and Hub repos, with what these say of their guidance."""

from typing import Any

from diffusers import DiffusionPipeline

from .class_conditional import ClassConditionalPipeline
from .core.guidance import check_guidance_rescale
from .guidance import recorded_guidance, saved_config, with_guidance


def load_pipeline(source: Any, *, guidance_rescale: float | None = None, **kwargs: Any) -> Any:
    """Load a pipeline by diffusers' own loader, with the guidance rescale that is recorded in it.

    Args:
        source: a Hub id or a folder.
        guidance_rescale: phi instead of what is recorded; 0 for none.
        kwargs: as in `DiffusionPipeline.from_pretrained`.

    Returns:
        The pipeline, of the class that it was saved as.

    Raises:
        OSError: there is no pipeline.
        ValueError: phi outside [0, 1], given or recorded.
        TypeError: phi for a pipeline without guidance.
    """
    check_guidance_rescale(guidance_rescale or 0.0)
    config = saved_config(source, **kwargs)
    recorded = recorded_guidance(config)
    ours = config["_class_name"] == ClassConditionalPipeline.__name__ and "custom_pipeline" not in kwargs
    pipe = (ClassConditionalPipeline if ours else DiffusionPipeline).from_pretrained(source, **kwargs)
    return with_guidance(pipe, recorded, guidance_rescale)

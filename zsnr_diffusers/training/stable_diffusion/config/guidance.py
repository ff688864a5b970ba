"""Guidance, and its distillation into few steps without it."""

from dataclasses import dataclass
from typing import Annotated, Any

from ....core.choices import (
    DEFAULT_GUIDANCE_RESCALE,
    DEFAULT_KEEP_LOW_FREQUENCIES,
    check_guidance_rescale,
    check_keep_low_frequencies,
)
from ...config import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option


@dataclass
class GuidanceConfig(Options):
    """Guidance of previews and model card, or of the teacher of a distillation."""

    guidance_scale: Annotated[float, NOT_NEGATIVE] = option(7.5, "Guidance scale of the previews.")
    guidance_rescale: float = option(
        DEFAULT_GUIDANCE_RESCALE, "Guidance rescale of the previews, and recommended on the model card."
    )
    keep_low_frequencies: int | None = option(
        None,
        "k for the lowest k x k frequencies that guidance does not change, in the previews and recorded for "
        f"load_pipeline (default: {DEFAULT_KEEP_LOW_FREQUENCIES} at zero terminal SNR, else 0).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance_rescale(self.guidance_rescale)
        check_keep_low_frequencies(self.keep_low_frequencies or 0)


@dataclass
class DistillationConfig(GuidanceConfig):
    """Few steps, and their guidance with them, instead of many guided ones."""

    distill_steps: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Train the LoRA so that the base, a model that predicts v at zero terminal SNR, generates in so many trailing "
        "steps of DDIM or Euler without guidance what it generates under --guidance_scale, --guidance_rescale and "
        "--keep_low_frequencies in many. The base without the LoRA is the teacher. Of the data only the captions are "
        "used, and for XL the sizes. Default: no distillation.",
    )
    teacher_substeps: Annotated[int, POSITIVE, IDENTITY] = option(
        4, "With --distill_steps: steps of the teacher for each of them, of a multistep solver of order 2."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_steps is None and self.teacher_substeps != DistillationConfig.teacher_substeps:
            raise ValueError(f"--teacher_substeps={self.teacher_substeps} is of --distill_steps; pass that too.")

    def identity_values(self) -> dict[str, Any]:
        """The parent's, and in a distillation the guidance, which is trained."""
        guidance = ("guidance_scale", "guidance_rescale", "keep_low_frequencies") if self.distill_steps else ()
        return super().identity_values() | {name: getattr(self, name) for name in guidance}

    @property
    def guidance(self) -> tuple[float, float, int]:
        """What the teacher of a distillation is guided by: scale, rescale, kept low frequencies."""
        k = self.keep_low_frequencies
        return self.guidance_scale, self.guidance_rescale, DEFAULT_KEEP_LOW_FREQUENCIES if k is None else k

    def describe_teacher(self) -> str:
        """The distillation in words."""
        scale, rescale, k = self.guidance
        guided = f"guidance scale {scale:g}, rescale {rescale:g}, lowest {k} x {k} frequencies kept"
        return (
            f"{self.distill_steps} steps without guidance, from {self.teacher_substeps} of the base for each, "
            f"{guided if scale > 1 else 'without guidance too'}"
        )

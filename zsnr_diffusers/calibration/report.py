"""The result of a calibration, and the part of it that a scheduler keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..utils.tables import Part, Report, Table, Text

ERRORS = ("default_error", "error", "held_out_default_error", "held_out_error")
"""Of a `CalibratedNumber`: of the default and the calibrated sampler, on what was fitted and on what was held out."""


@dataclass(frozen=True)
class CalibratedNumber:
    """The calibration of one step count.

    Errors are RMS differences to the teacher's clean samples, divided by their standard deviation, as a geometric mean
    over images. `error` is for the fitted prompts, `held_out_error` for held-out prompts and seeds.

    Attributes:
        num_inference_steps: n.
        steps: `timesteps`, `weights`, `keeps` and `kappas`, as a scheduler's config holds them
            (`zsnr_diffusers.core.calibrated`).
        default_error: of the default sampler.
        error: of the calibrated one.
        held_out_default_error: of the default sampler, held out.
        held_out_error: of the calibrated one, held out.
    """

    num_inference_steps: int
    steps: dict[str, Any]
    default_error: float
    error: float
    held_out_default_error: float
    held_out_error: float

    @property
    def better(self) -> bool:
        """Whether the calibrated sampler is closer to the teacher on held-out prompts; otherwise it is dropped."""
        return self.held_out_error < self.held_out_default_error

    def config(self) -> dict[str, Any]:
        """This one as the `calibration` of a scheduler, whether it is better or not."""
        return {str(self.num_inference_steps): self.steps}

    def to_dict(self) -> dict[str, Any]:
        """In types of JSON, for report.json."""
        errors = {name: getattr(self, name) for name in ERRORS}
        return {"num_inference_steps": self.num_inference_steps, **self.steps, **errors, "kept": self.better}


@dataclass(frozen=True)
class Calibration(Report):
    """All calibrated step counts, and the settings.

    Attributes:
        numbers: each step count, including those without improvement.
        guidance_scale: w in u + w (c - u).
        guidance_rescale: phi of Lin et al. 2023, Algorithm 2.
        teacher_steps: of the reference run.
        images: number of fitted and of held-out images.
        keep_low_frequencies: k of `enable_guidance_rescale`.
    """

    numbers: tuple[CalibratedNumber, ...]
    guidance_scale: float
    guidance_rescale: float
    teacher_steps: int
    images: tuple[int, int]
    keep_low_frequencies: int = 0

    def config(self) -> dict[str, Any]:
        """The `calibration` of a `ZeroSNRMultistepScheduler`: the improved step counts, as strings."""
        made_for = {
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "keep_low_frequencies": self.keep_low_frequencies,
        }
        return {
            number: steps | made_for for one in self.numbers if one.better for number, steps in one.config().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The calibration in types of JSON, for report.json."""
        return asdict(self) | {"numbers": [one.to_dict() for one in self.numbers]}

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: a row of errors to the teacher for each step count."""
        fitted, held_out = self.images
        yield Text(
            f"error to {self.teacher_steps} steps at guidance {self.guidance_scale:g} (guidance_rescale "
            f"{self.guidance_rescale:g}, keep_low_frequencies {self.keep_low_frequencies}): {fitted} images fitted, "
            f"{held_out} held out"
        )
        head = ("steps", "default", "calibrated", "held out: default", "calibrated", "ratio", "")
        yield Table(head, tuple(map(_table_row, self.numbers)), "<>>>>><")


def _table_row(one: CalibratedNumber) -> tuple[str, ...]:
    """Errors of one step count, fitted and held out, and whether it is kept."""
    errors = [getattr(one, name) for name in ERRORS]
    ratio = one.held_out_error / one.held_out_default_error if one.held_out_default_error else 1.0
    kept = "kept" if one.better else "dropped: no improvement on held-out prompts"
    return str(one.num_inference_steps), *(f"{error:.4f}" for error in errors), f"{ratio:.2f}", kept

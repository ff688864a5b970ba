"""Report on a fitted start: how much of each frequency captions explain, on held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..core.law_fit import FOLDS
from ..utils.tables import Part, Report, Table, Text

if TYPE_CHECKING:
    from ..core.law_fit import LawFit


@dataclass(frozen=True)
class StartReport(Report):
    """Quality of a fitted start.

    Attributes:
        images: number of fitted images.
        captions: number of distinct captions; 0 for a start that ignores prompts.
        resolution: pixels per side of the encoded images.
        frequencies: number of modeled frequencies per side.
        explained: fraction of the variance of each frequency that captions explain on held-out images, 0 if the start
            does not use them; a row for each vertical frequency.
        deviation: standard deviation of each frequency's amplitude, likewise, over all channels.
        gains: by number of frequencies, log likelihood of held-out images minus that under pure noise, in nats.
    """

    images: int
    captions: int
    resolution: int
    frequencies: int
    explained: list[list[float]]
    deviation: list[list[float]]
    gains: dict[str, float]

    @classmethod
    def of_fit(cls, fit: LawFit, images: int, captions: int, resolution: int) -> StartReport:
        """The report on a fit with these numbers of images and distinct captions."""
        k = fit.law.frequencies
        explained = fit.explained[:k, :k].clamp(min=0)
        gains = {str(number): gain for number, gain in fit.gains.items()}
        deviation = fit.power[:k, :k].sqrt()
        return cls(images, captions, resolution, k, explained.tolist(), deviation.tolist(), gains)

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> StartReport:
        """The report of a `Start`."""
        return cls(**report)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serializable values."""
        return asdict(self)

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report."""
        held_out = "captions" if self.captions >= 2 * FOLDS else "images (too few captions to hold some out)"
        of = f"{self.captions} captions" if self.captions else "without captions"
        yield Text(f"{self.images} images, {of}; cross-validation: 5 folds of the {held_out}")
        gains = ", ".join(f"{k}: {gain:.1f}" for k, gain in self.gains.items())
        yield Text(f"frequencies: {self.frequencies} x {self.frequencies}; nats per image over pure noise: {gains}")
        head = ("variance that captions explain", *(f"across {j}" for j in range(self.frequencies)))
        rows = [
            (f"down {i}", *(f"{share:.0%}" if share else "-" for share in row)) for i, row in enumerate(self.explained)
        ]
        yield Table(head, tuple(rows), "<" + ">" * self.frequencies)
        yield Text(self._verdict())

    def _verdict(self) -> str:
        """The expected effect of the start, in a sentence."""
        brightness = self.explained[0][0]
        if not self.captions:
            return "The start ignores prompts: images regain their range of brightness, at random."
        if not brightness:
            return (
                "Captions do not predict the brightness and color of held-out images, so prompts will not control "
                "them; images regain their range at random. Describe light and color in captions, or use more images."
            )
        return (
            f"Captions explain {brightness:.0%} of the variance of brightness and color, so prompts will control this "
            "much of it."
        )

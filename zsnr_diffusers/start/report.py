"""What a fitted start knows: how much of each frequency captions explain, on images that were held out."""

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
        images: how many were fitted to.
        captions: distinct ones; 0 for a start without prompt.
        resolution: pixels per side at which images were encoded.
        frequencies: along each side, as many as were modeled.
        explained: share of the variance of each frequency that captions explain on images held out, 0 where the start
            does not use them; a row for each frequency from top to bottom.
        deviation: standard deviation of each frequency's amplitude, likewise, over all channels.
        gains: by number of frequencies, log likelihood of images held out over that under pure noise, in nats.
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
        """The report on a fit to so many images and distinct captions."""
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
        """The report in types of JSON."""
        return asdict(self)

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report."""
        held_out = "captions" if self.captions >= 2 * FOLDS else "images (captions are too few to hold out)"
        of = f"{self.captions} captions" if self.captions else "without captions"
        yield Text(f"{self.images} images, {of}; held out: a fifth of the {held_out} at a time")
        gains = ", ".join(f"{k}: {gain:.1f}" for k, gain in self.gains.items())
        yield Text(f"frequencies: {self.frequencies} x {self.frequencies}; nats per image over pure noise: {gains}")
        head = ("variance that captions explain", *(f"across {j}" for j in range(self.frequencies)))
        rows = [
            (f"down {i}", *(f"{share:.0%}" if share else "-" for share in row)) for i, row in enumerate(self.explained)
        ]
        yield Table(head, tuple(rows), "<" + ">" * self.frequencies)
        yield Text(self._verdict())

    def _verdict(self) -> str:
        """What may be expected of the start, in a sentence."""
        brightness = self.explained[0][0]
        if not self.captions:
            return "The start is the same for every prompt: images get their range of brightness back, by chance."
        if not brightness:
            return (
                "Captions say nothing of brightness and color that holds for images held out, so prompts will not "
                "decide on them; images get their range back, by chance. Describe light and color, or give more "
                "images."
            )
        return f"Captions explain {brightness:.0%} of brightness and color, and prompts will decide on as much."

"""Measure what zero terminal SNR is for: whether a model covers the brightness of real images, and ignores the noise.

Importing this loads neither torch nor a plotting library; each function imports what it needs.
"""

from .generation import generate_images, iter_images
from .invariance import TerminalInvariance, terminal_invariance
from .luminance import (
    LuminanceCoverage,
    LuminanceSummary,
    luminance_coverage,
    mean_luminance,
    prompt_share,
)
from .plots import plot_luminance, sample_grid
from .sources import folder_luminance, pipeline_luminance

__all__ = [
    "LuminanceCoverage",
    "LuminanceSummary",
    "TerminalInvariance",
    "folder_luminance",
    "generate_images",
    "iter_images",
    "luminance_coverage",
    "mean_luminance",
    "pipeline_luminance",
    "plot_luminance",
    "prompt_share",
    "sample_grid",
    "terminal_invariance",
]

"""Calibration: fit a sampler to one model at few steps and one guidance scale, from the model's own samples.

Importing this loads diffusers; `zsnr calibrate` is the command.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .calibrator import Calibrator, calibrate
    from .report import CalibratedNumber, Calibration

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "calibrator": "Calibrator calibrate",
        "report": "CalibratedNumber Calibration",
    },
)

__all__ = ["CalibratedNumber", "Calibration", "Calibrator", "calibrate"]

"""A sampler fitted to a model by what the model itself generates: at few steps, at the guidance it is used with.

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

"""A sampler fitted to a model by what the model itself generates: at few steps, at the guidance it is used with.

Importing this loads diffusers; `zsnr calibrate` is the command.
"""

from .calibrator import Calibrator, calibrate
from .report import CalibratedNumber, Calibration

__all__ = ["CalibratedNumber", "Calibration", "Calibrator", "calibrate"]

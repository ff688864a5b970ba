"""Calibration: a sampler fitted to one model at few steps and one guidance scale, from its own samples.

Importing this loads diffusers; `zsnr calibrate` is the command.
"""

from .calibrator import Calibrator, calibrate
from .report import CalibratedNumber, Calibration

__all__ = ["CalibratedNumber", "Calibration", "Calibrator", "calibrate"]

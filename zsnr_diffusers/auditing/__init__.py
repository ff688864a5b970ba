"""Checks whether a model is configured correctly for zero terminal SNR or flow matching, and suggests fixes.

`audit` reads the config of a scheduler and runs that scheduler on data with a known result. No weights are loaded
unless requested.
"""

from .api import audit, fix
from .finding import Finding
from .report import Audit

__all__ = ["Audit", "Finding", "audit", "fix"]

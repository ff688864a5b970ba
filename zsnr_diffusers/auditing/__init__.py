"""Checks whether a model is configured correctly for zero terminal SNR or flow matching, and suggests fixes.

`audit` reads the config of a scheduler and runs that scheduler on data with a known result. No weights are loaded
unless requested.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .api import audit, fix
    from .finding import Finding
    from .report import Audit

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "api": "audit fix",
        "finding": "Finding",
        "report": "Audit",
    },
)

__all__ = ["Audit", "Finding", "audit", "fix"]

"""Starts for epsilon models that are not retrained: low frequencies that they expect in x_T, fitted or set by hand."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .fit import fit_start
    from .hand_set import hand_set_start
    from .mixin import StartMixin, disable_start, enable_start
    from .report import StartReport
    from .start import START_FILE, Start

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "fit": "fit_start",
        "hand_set": "hand_set_start",
        "mixin": "StartMixin disable_start enable_start",
        "report": "StartReport",
        "start": "START_FILE Start",
    },
)

__all__ = [
    "START_FILE",
    "Start",
    "StartMixin",
    "StartReport",
    "disable_start",
    "enable_start",
    "fit_start",
    "hand_set_start",
]

"""Is a model set up right for zero terminal SNR or flow matching, and if not, what makes it right?

`audit` looks at a scheduler's config and, where that is the honest way, runs the scheduler that it describes on data
whose right result is known. No weights are loaded unless asked for.
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

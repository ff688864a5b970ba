"""Tables and figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """All rows by arm, cell and seed; terminal invariance by arm and seed; real images as a floor."""

    rows: dict[Any, Any]
    invariance: dict[Any, float]
    real: Any


def write_report(results: Results, output_dir: Path, dependencies: str) -> None:
    """Placeholder."""

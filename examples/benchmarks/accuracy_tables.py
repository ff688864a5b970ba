"""How the studies of accuracy print and save what they found."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: texts to the left, numbers to the right with four digits."""
    rows = [list(row) for row in rows]
    cells = [list(header), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if isinstance(value, str) else ">" for value in rows[0]]
    print(f"\n{title}\n{'-' * len(title)}")
    for row in cells:
        print("  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)).rstrip())


def triple(figures: Sequence[float], form: str = ".3g") -> str:
    """Over all cases, and in brackets over Gaussians and over mixtures."""
    over_all, gaussians, mixtures = (f"{value:{form}}" for value in figures)
    return f"{over_all} ({gaussians}, {mixtures})"


def show_failures(failures: Sequence[tuple[str, str]], where: str) -> None:
    """Print what stock stumbled over, and how often."""
    print(f"\nStock runs that crashed or gave NaN {where}: {len(failures)}")
    for (configuration, reason), count in sorted(Counter(failures).items()):
        print(f"  {count:4d}  {configuration}: {reason}")


def save(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(plain(report), indent=1) + "\n")


def plain(value: Any) -> Any:
    """With None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

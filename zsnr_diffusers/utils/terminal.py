"""Reports on a terminal: tables that fit its width, colors by severity, and code that can be copied.

The only module that uses `rich`, which is imported when something is drawn.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from .tables import KeyValues, Note, Part, Remarks, Report, Style, Table, Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Drawing

_STYLES: dict[Style, str] = {
    "plain": "",
    "title": "bold",
    "good": "bold green",
    "warning": "bold yellow",
    "bad": "bold red",
    "quiet": "dim",
}
_CODE = "cyan"


def show(report: Report) -> None:
    """Print a report: as `rich` tables if standard output is a capable terminal, else as plain text."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        print(report)
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)  # a folder may be called [red] or :cat:
    for part in report.parts():
        _print_part(console, part)
        console.print()


def _print_part(console: Console, part: Part) -> None:
    """Print one part of a report on a `rich` console."""
    match part:
        case Text():
            console.print(part.content, style=_STYLES[part.tone])
        case KeyValues():
            console.print(_key_values_table(part))
        case Table():
            console.print(_rich_table(_transpose(part) if _exceeds_console(console, part) else part))
        case Remarks():
            for i, remark in enumerate(part.remarks):
                if i:
                    console.print()
                _print_note(console, remark, part.width)


def _key_values_table(part: KeyValues) -> Drawing:
    """Names and values as a `rich` table, without columns that are empty in all rows."""
    columns = [column for column in zip(part.head, *part.rows, strict=True) if any(column[1:])]
    drawing = _empty_table()
    for (head, *_), style in zip(columns, ("bold", "", "dim"), strict=False):
        drawing.add_column(head, style=style, overflow="fold")
    for row in list(zip(*columns, strict=True))[1:]:
        drawing.add_row(*row)
    return drawing


def _rich_table(part: Table) -> Drawing:
    """A report's table as a `rich` table, its reference rows dimmed."""
    drawing = _empty_table()
    drawing.show_header = bool(part.head)
    for head, side in zip(part.head or [""] * len(part.align), part.align, strict=True):
        drawing.add_column(head, justify="right" if side == ">" else "left", overflow="fold")
    first = len(part.rows) - part.reference
    for i, cells in enumerate(part.rows):
        drawing.add_row(*cells, style="dim" if i >= first else None)
    return drawing


def _empty_table() -> Drawing:
    """A compact `rich` table without rows and with a line under its head."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawing

    return Drawing(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _exceeds_console(console: Console, part: Table) -> bool:
    """Whether a table with a head is wider than the console and should be transposed."""
    unbounded = console.options.update(max_width=sum(len(cell) + 2 for row in (part.head, *part.rows) for cell in row))
    return bool(part.head) and console.measure(_rich_table(part), options=unbounded).maximum > console.width


def _transpose(part: Table) -> Table:
    """The table with its columns as rows."""
    head, *rows = zip(part.head, *part.rows, strict=True)
    return Table(head, tuple(rows), "<" + ">" * len(part.rows))


def _print_note(console: Console, remark: Note, width: int) -> None:
    """Print a note; code starts at the left margin and is not wrapped, so it can be copied and pasted."""
    from rich.table import Table as Drawing

    quiet = "dim" if remark.tone == "quiet" else ""
    drawing = Drawing.grid(padding=(0, 2, 0, 0))
    drawing.add_column(width=width, style=_STYLES[remark.tone])
    drawing.add_column(style=quiet, overflow="fold")
    drawing.add_row(remark.label, remark.content)
    console.print(drawing)
    for line in remark.advice.splitlines():
        if line.endswith(":"):  # describes the next one
            console.print(f"{'':{width}}  {line}", style=quiet)
        else:
            console.print(line, style=_CODE, soft_wrap=True)

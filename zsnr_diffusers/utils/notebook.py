"""Escaped HTML of texts and tables for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_COLOURS = {
    "title": "font-weight:bold",
    "good": "font-weight:bold;color:#1a7f37",
    "warning": "font-weight:bold;color:#9a6700",
    "bad": "font-weight:bold;color:#cf222e",
    "quiet": "opacity:0.7",
}
"""CSS by `tables.Style`; plain text has none."""


def styled(tag: str, text: str, style: str) -> str:
    """An element with a text, in the color of a style."""
    return f'<{tag} style="text-align:left;{_COLOURS.get(style, "")}">{html.escape(text)}</{tag}>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Rows of cells, under a head if it has any text; `align` is `<` or `>` for each column."""
    sides = ["right" if side == ">" else "left" for side in align]

    def row(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, sides, strict=False)
        cell = "".join(f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>' for text, side in pairs)
        return f"<tr>{cell}</tr>"

    lines = [row(head, "th")] if any(head) else []
    return f"<table>{''.join([*lines, *(row(cells, 'td') for cells in rows)])}</table>"


def note(label: str, style: str, content: str, code: str) -> str:
    """A row of a table: a label, a text and code below it."""
    return (
        f"<tr>{styled('td', label, style)}"
        f'<td style="text-align:left">{html.escape(content)}<pre>{html.escape(code)}</pre></td></tr>'
    )

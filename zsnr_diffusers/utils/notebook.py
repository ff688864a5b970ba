"""Reports in a notebook: parts as HTML, in which everything is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

from .tables import KeyValues, Part, Remarks, Style, Table, Text

_COLOURS: dict[Style, str] = {
    "plain": "",
    "title": "font-weight:bold",
    "good": "font-weight:bold;color:#1a7f37",
    "warning": "font-weight:bold;color:#9a6700",
    "bad": "font-weight:bold;color:#cf222e",
    "quiet": "opacity:0.7",
}


def parts_as_html(parts: Iterable[Part]) -> str:
    """Texts as paragraphs, names and values, tables and notes as tables."""
    return "\n".join(map(_part_as_html, parts))


def _part_as_html(part: Part) -> str:
    match part:
        case Text():
            return _styled("p", part.content, part.tone)
        case KeyValues():
            return _table(part.head if any(part.head) else (), part.rows, "<" * max(map(len, (part.head, *part.rows))))
        case Table():
            return _table(part.head, part.rows, part.align)
        case Remarks():
            notes = "".join(
                f"<tr>{_styled('td', note.label, note.tone)}<td>{html.escape(note.content)}"
                f"<pre>{html.escape(note.advice)}</pre></td></tr>"
                for note in part.remarks
            )
            return f"<table>{notes}</table>"


def _styled(tag: str, text: str, style: Style) -> str:
    attribute = f' style="text-align:left;{_COLOURS[style]}"'
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"


def _table(head: tuple[str, ...], rows: tuple[tuple[str, ...], ...], align: str) -> str:
    """Rows of cells, under a head if there is one."""
    sides = ["right" if side == ">" else "left" for side in align]

    def row(cells: tuple[str, ...], tag: str) -> str:
        pairs = zip(cells, sides, strict=False)
        return "".join(f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>' for cell, side in pairs)

    lines = [row(head, "th")] if head else []
    lines += [row(cells, "td") for cells in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

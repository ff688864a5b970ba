"""Parts of a report: written as plain text here, and drawn on a terminal by `terminal`.

Plain text is for pipes, files and `str`: aligned, with a line for each fact, suitable for grep and diff.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from . import notebook

Style = Literal["plain", "title", "good", "warning", "bad", "quiet"]
"""Meaning of a color."""


class Report:
    """Base class of printable reports: plain text by `str`, tables by `terminal.show` and in a notebook."""

    def parts(self) -> Iterable[Part]:
        """Texts, tables and notes of the report, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(part.text() for part in self.parts())

    def _repr_html_(self) -> str:
        return "\n".join(part.html() for part in self.parts())


@dataclass(frozen=True)
class Text(Report):
    """A sentence, which can be a complete report."""

    content: str
    tone: Style = "plain"

    def parts(self) -> Iterable[Part]:
        """The text itself, as the only part of a report."""
        return (self,)

    def text(self) -> str:
        """The sentence as plain text."""
        return self.content

    def html(self) -> str:
        """The sentence as a paragraph."""
        return notebook.styled("p", self.content, self.tone)


@dataclass(frozen=True)
class KeyValues:
    """Names and their values.

    Attributes:
        head: of the columns of a table; not shown in plain text.
        rows: name and value, and optionally a third column with a remark on the value, which may be empty.
        aside: format of the remark in plain text.
        indent: of the text.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    aside: str = " ({})"
    indent: str = ""

    def html(self) -> str:
        """A table of as many columns as the rows have."""
        return notebook.table(self.head, self.rows, "<" * max(map(len, (self.head, *self.rows))))

    def text(self) -> str:
        """Plain text, a line for each name and its value."""
        width = max((len(name) for name, *_ in self.rows), default=0)
        return "\n".join(
            f"{self.indent}{name:<{width}} {value}" + "".join(self.aside.format(note) for note in notes if note)
            for name, value, *notes in self.rows
        )


@dataclass(frozen=True)
class Table:
    """Rows of as many cells each.

    Attributes:
        head: of the columns; empty for none.
        rows: the cells.
        align: `<` or `>` for each column.
        reference: number of reference rows, at the end.
        indent: of the text.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    reference: int = 0
    indent: str = ""

    def html(self) -> str:
        """A table with aligned columns."""
        return notebook.table(self.head, self.rows, self.align)

    def text(self) -> str:
        """Plain text in aligned columns."""
        lines = [self.head, *self.rows] if self.head else self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(self.indent + self._row_as_text(cells, widths).rstrip() for cells in lines)

    def _row_as_text(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        return "  ".join(f"{cell:{side}{n}}" for cell, side, n in zip(cells, self.align, widths, strict=True))


@dataclass(frozen=True)
class Note:
    """A note and its remedy.

    Attributes:
        label: kind of note.
        content: text of the note.
        advice: remedy, in the format of `one_line`.
        tone: of the label.
    """

    label: str
    content: str
    advice: str
    tone: Style


@dataclass(frozen=True)
class Remarks:
    """A list of remarks."""

    remarks: tuple[Note, ...]

    @property
    def width(self) -> int:
        """Width of the widest label, in characters."""
        return max((len(remark.label) for remark in self.remarks), default=0)

    def html(self) -> str:
        """A table with a row for each note."""
        rows = (notebook.note(one.label, one.tone, one.content, one.advice) for one in self.remarks)
        return f"<table>{''.join(rows)}</table>"

    def text(self) -> str:
        """Plain text, two lines for each note: what it is, and what to do."""
        return "\n".join(
            f"{remark.label:<{self.width}}  {remark.content}\n{'':<{self.width}}  -> {one_line(remark.advice)}"
            for remark in self.remarks
        )


Part: TypeAlias = Text | KeyValues | Table | Remarks


def one_line(advice: str) -> str:
    """Advice of several lines as one line: items are joined by semicolons, or by a space after a colon."""
    return advice.replace(":\n", ": ").replace("\n", "; ")

import html
import re
from html.parser import HTMLParser

import pytest
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import audit
from zsnr_diffusers.utils.tables import KeyValues, Note, Remarks, Table, Text

EVIL = "<script>&\"'"
PARTS = {
    "text": Text(EVIL, "title"),
    "values": KeyValues((EVIL, "value"), ((EVIL, EVIL),)),
    "table": Table((EVIL, EVIL), ((EVIL, EVIL),), "<>"),
    "notes": Remarks((Note(EVIL, EVIL, EVIL, "bad"),)),
}


class _Tags(HTMLParser):
    """Counts what is open, and keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], set(), ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


def read(text):
    tags = _Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_everything_is_escaped(part):
    tags = read(part.html())
    assert tags.seen <= {"p", "table", "tr", "th", "td", "pre"}
    said = {Text: 1, KeyValues: 3, Table: 4, Remarks: 3}
    assert tags.text.count(EVIL) == said[type(part)]


def test_cells_are_aligned_and_a_head_is_left_out_where_there_is_none():
    text = Table((), (("a", "1"),), "<>").html()
    assert text == '<table><tr><td style="text-align:left">a</td><td style="text-align:right">1</td></tr></table>'
    assert "<th" not in KeyValues(("", ""), (("a", "1"),)).html()
    assert KeyValues((), ()).html() == "<table></table>"


def test_a_report_says_in_a_notebook_what_it_says_as_text():
    report = audit(tiny_unconditional())
    words = re.findall(r"[\w.]+", html.unescape(read(report._repr_html_()).text))
    said = re.findall(r"[\w.]+", str(report))
    assert set(said) <= {*words, "right", "1"}
    assert repr(report) == f"Audit of DDIMPipeline: {report.verdict} (note: {len(report.findings)})"

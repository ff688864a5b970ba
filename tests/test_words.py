"""README, guides, docstrings and messages use the terms of the field."""

import ast
import io
import re
import tokenize
from pathlib import Path

from pages import FOLDERS, PAGES, ROOT

TERMS = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bpaint(s|ed|ing)?\b(?! by)": "generate",
    r"\bgarish": "over-saturated",
    r"\brightly\b": "correctly",
    r"\banew\b": "again",
    r"\bnevertheless\b": "anyway",
    r"\bnumbers of steps\b": "step counts",
    r"\b(data sets?)\b": "dataset",
    r"\b(networks?|models?) of pixels\b": "pixel-space network, pixel-space model",
    r"\bof another kind\b": "of a different kind",
    r"\b(can|not to) be had\b": "is available, is not available",
    r"\b(image to image|text to image)\b": "image-to-image, text-to-image",
    r"\bPICTURES\b": "IMAGES",
    r"\b(doors?)\b(?! of)": "the name of the function",
    r"\bgo(es)? on (with|from)\b": "continue with, continue from",
    r"\bbeside\b": "next to, besides",
    r"\bin place of\b": "instead of",
    r"\bif need be\b": "if necessary",
    r"\bwhole numbers?\b": "integer",
    r"\bdata that is one point\b": "single-point data",
    r"\bfresh noise\b": "new noise, added noise",
    r"\bmoving average\b": "EMA",
    r"\btext states\b": "text embeddings",
    r"\bfigures of papers\b": "metrics of papers",
    r"\b[Gg]rey\b|\b[Cc]olour|\bneighbour": "gray, color, neighbor",
    r"\b(whoever|nobody|somebody)\b": "a sentence with the agent",
    r"\b(stock's|of stock)\b": "diffusers'",
    r"\bat the Hub\b": "on the Hub",
    r"\b(one's own|of one's)\b": "your own",
    r"\btrained on to\b": "fine-tuned to",
    r"\bmake(s)? (again|anew)\b": "create again",
    r"\bfall(s|en)? back\b(?! to)": "reverse",
    r"\b(is|are) shipped\b|\bships\b": "is saved with",
}
"""Patterns that must not occur, and their replacements."""

ON_PAGES = {
    r"\bstock\b": "diffusers'",
    r"\bpictures?\b": "image",
    r"\bhas to be told\b": "needs a setting",
    r"\b(prompt share|share that the prompt explains)\b": "fraction of variance explained by the prompt",
    r"\bfloor of W1\b": "expected W1 from finite sampling",
    r"(?<!S)(?<!SD)\bXL\b(?! Vpred)": "SDXL",
    r"\bwhoever\b|\bnobody\b": "a sentence with the agent",
}
"""Further patterns for README and guides."""

SOURCES = sorted(Path(ROOT, "zsnr_diffusers").rglob("*.py"))


def prose(text):
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)


def found(text, terms):
    """Each forbidden word in its context, with its replacement."""
    matches = ((match, instead) for word, instead in terms.items() for match in re.finditer(word, text))
    return [(text[max(match.start() - 30, 0) : match.end() + 30], instead) for match, instead in matches]


def test_pages():
    for page in [*PAGES, *FOLDERS]:
        assert (page, found(prose(page.read_text(encoding="utf-8")), TERMS | ON_PAGES)) == (page, [])


def test_other_pages():
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "zsnr_diffusers/DESIGN.md"):
        assert (name, found(prose(Path(ROOT, name).read_text(encoding="utf-8")), TERMS)) == (name, [])


def test_docstrings_and_messages():
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert found("\n".join(texts), TERMS) == []
    assert len(texts) > 3000


def test_comments():
    comments = [
        token.string
        for path in SOURCES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.COMMENT
    ]
    assert found("\n".join(comments), TERMS) == []
    assert len(comments) > 300


def test_the_list_finds_what_it_is_for():
    assert found("mended in all numbers of steps", TERMS) == [
        ("mended in all numbers of steps", "fix"),
        ("mended in all numbers of steps", "step counts"),
    ]

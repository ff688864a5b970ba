"""README and guides as tests read them: code blocks, commands, links."""

import re
import shlex
from pathlib import Path

import zsnr_diffusers

ROOT = Path(zsnr_diffusers.__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted(Path(ROOT, "examples", "guides").glob("*.md"))
PAGES = [README, ROOT / "examples" / "README.md", *GUIDES]
FOLDERS = sorted(Path(ROOT, "examples").glob("*/README.md"))
"""Pages of one folder of examples each, which its own tests run."""


def guide(name):
    """The text of a guide."""
    return Path(ROOT, "examples", "guides", f"{name}.md").read_text(encoding="utf-8")


def blocks(text, language):
    """The code blocks of a language, without the indent of a list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def command_lines(text):
    """Every command of the `sh` blocks, and of python and accelerate in the text, as words."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(command.split()) for command in re.findall(r"`((?:python|accelerate) [^`]+)`", prose)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(text, module):
    """Arguments of the commands that run a module or program, in order."""
    return [line[line.index(module) + 1 :] for line in command_lines(text) if module in line]


def anchors(text):
    """What links to headings of a page end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def links(text):
    """Relative links of a page, as pairs (path, anchor)."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text)
    return [(path, anchor) for path, anchor in found if path or anchor]

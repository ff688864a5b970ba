"""Pages of the documentation site that are not files below `examples/`: the overview, the API reference, the project.

A hook of MkDocs. Guides are read where they lie; links that make sense on GitHub only are turned into text.
"""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "zsnr_diffusers/DESIGN.md": "design.md",
}
"""Pages by their path in the repository, and where they stand on the site."""

MODULES = ("", "core", "evaluation", "training", "auditing", "start", "calibration", "hub")
"""Modules of the API reference, below the package."""

BASES = {"": ("schedulers.base.ZeroSNRScheduler", "schedulers.flow.FlowMatchScheduler")}
"""What public classes inherit their parameters and methods from, shown after them."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def on_config(config):
    """Put the guides into the navigation, in the order of the index."""
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for entry in config.nav:
        if "Guides" in entry:
            entry["Guides"] = re.findall(r"\((guides/\w+\.md)\)", index)
    return config


def on_files(files, config):
    """Add the generated pages, and leave out the index that GitHub shows of `examples/`."""
    files.remove(files.get_file_from_path("README.md"))
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_relink(text, Path(source), target)))
    for module in MODULES:
        name = module or "zsnr_diffusers"
        files.append(File.generated(config, f"api/{name}.md", content=reference(module)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of a guide that lead out of the site into text."""
    if page.file.generated_by is not None:
        return markdown
    return _relink(markdown, Path("examples", page.file.src_uri), page.file.src_uri)


def public_names(module):
    """`__all__` of a module of the package, read without importing it; constants last."""
    source = Path(ROOT, "zsnr_diffusers", module, "__init__.py").read_text(encoding="utf-8")
    lists = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
    )
    return sorted(ast.literal_eval(next(lists)), key=str.isupper)


def reference(module):
    """The page of a module: its docstring, and signature and docstring of each public name."""
    path = f"zsnr_diffusers.{module}".rstrip(".")
    options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
    head = f"# {path}\n\n::: {path}\n    options: {options}\n"
    names = [*(_unambiguous(module, name) for name in public_names(module)), *BASES.get(module, ())]
    return head + "".join(f"\n::: {path}.{name}\n" for name in names)


def _unambiguous(module, name):
    """The path of a name below its module; a submodule of the same name would be shown in its place."""
    return f"{name}.{name}" if Path(ROOT, "zsnr_diffusers", module, f"{name}.py").is_file() else name


def _relink(text, source, target):
    """Links of a page of the repository as links of the site; those to nothing on it become text."""

    def link(match):
        image, label, path, anchor = match[1], match[2], match[3], match[4] or ""
        if not path:
            return match[0]
        place = (ROOT / source.parent / path).resolve().relative_to(ROOT.resolve()).as_posix()
        if place in PAGES:
            here = PAGES[place]
        elif place.startswith("examples/") and (ROOT / place).is_file() and not place.endswith(".py"):
            here = place.removeprefix("examples/")
        else:
            return label
        return f"{image}[{label}]({'../' * target.count('/')}{here}{anchor})"

    return LINK.sub(link, text)

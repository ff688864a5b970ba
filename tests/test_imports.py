"""Who may import whom, read from the source."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import zsnr_diffusers

PACKAGE = Path(zsnr_diffusers.__file__).parent

ROOMS = {
    "core": {"utils"},
    "utils": set(),
    "unet": set(),
    "schedulers": {"core", "utils"},
    "bridges": {"core", "schedulers"},
    "guidance": {"core", "utils"},
    "start": {"core", "utils", "guidance"},
    "evaluation": {"core", "utils", "schedulers"},
    "pipelines": {"core", "guidance"},
    "class_conditional": {"core", "guidance"},
    "calibration": {"core", "utils", "schedulers", "evaluation"},
    "hub": {"core", "utils", "schedulers", "guidance", "start", "class_conditional"},
    "auditing": {"core", "utils", "schedulers", "guidance", "start", "evaluation", "hub"},
    "training": {
        "core",
        "utils",
        "unet",
        "schedulers",
        "bridges",
        "guidance",
        "start",
        "evaluation",
        "pipelines",
        "class_conditional",
        "hub",
    },
    "__main__": {"cli"},
    "cli": {
        "__init__",
        "core",
        "utils",
        "schedulers",
        "evaluation",
        "calibration",
        "start",
        "hub",
        "auditing",
        "training",
    },
}
"""What each room of the package may import, besides itself."""

LIBRARIES = {"core": {"torch"}, "utils.image_formats": {"PIL"}, "utils.images": {"PIL", "numpy"}}
"""The libraries that these may import, besides the standard one."""

ONLY_IN = {
    "accelerate": {"training", "utils.distributed"},
    "datasets": {"training"},
    "pyarrow": {"training"},
    "fsspec": {"training"},
    "yaml": {"training", "hub.marks"},
    "matplotlib": {"evaluation"},
    "scipy": {"evaluation"},
    "rich": {"utils.terminal"},
}
"""Where these libraries may be imported; plotting and statistics inside the function that needs them."""


def imports():
    """(module, library or None, module of ours or None, whether inside a function) of every import."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    assert len(modules) > 100
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        later, for_types = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                later |= {id(inner) for inner in ast.walk(node)}
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                for_types |= {id(inner) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.Import):
                yield from ((module, alias.name.split(".")[0], None, id(node) in later) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield module, str(node.module).split(".")[0], None, id(node) in later
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                for alias in node.names:
                    names = [f"{base}.{alias.name}", f"{base}.{alias.name}.__init__", base, f"{base}.__init__"]
                    yield (
                        module,
                        None,
                        next(name for name in (n.lstrip(".") for n in names) if name in modules),
                        id(node) in later,
                    )


def is_in(module, places):
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def test_rooms_import_only_what_they_may():
    for module, _, ours, _ in imports():
        room, other = module.split(".")[0], (ours or module).split(".")[0]
        assert room == "__init__" or other in ROOMS[room] | {room}, f"{module} imports {ours}"


def test_core_needs_no_more_of_the_package_than_names_that_are_imported_later():
    assert {
        ours for module, _, ours, _ in imports() if is_in(module, ["core"]) and not is_in(ours or "core", ["core"])
    } == {"utils.lazy"}


@pytest.mark.full
def test_no_import_goes_round_in_a_circle():
    graph = {}
    for module, _, ours, _ in imports():
        if ours is not None:
            graph.setdefault(module, set()).add(ours)
    TopologicalSorter(graph).prepare()


def test_libraries_are_imported_where_they_belong():
    for module, library, _, inside in imports():
        if library is None:
            continue
        for place, allowed in LIBRARIES.items():
            if is_in(module, [place]) and library not in sys.stdlib_module_names:
                assert library in allowed, f"{module} imports {library}"
        if library in ONLY_IN:
            assert is_in(module, ONLY_IN[library]), f"{module} imports {library}"
            if library in ("matplotlib", "scipy"):
                assert inside, f"{module} imports {library} outside the function that needs it"


def test_public_names_are_there():
    for name in zsnr_diffusers.__all__:
        assert getattr(zsnr_diffusers, name).__doc__


FACES = ("auditing", "calibration", "core", "evaluation", "guidance", "hub", "schedulers", "start", "training")


def test_tab_completion_shows_public_names_and_rooms_and_nothing_else():
    for face in (zsnr_diffusers, *(getattr(zsnr_diffusers, room) for room in FACES)):
        rooms = FACES if face is zsnr_diffusers else ()
        assert {name for name in dir(face) if not name.startswith("__")} == {*face.__all__, *rooms}
    assert "__version__" in dir(zsnr_diffusers)


@pytest.mark.parametrize("room", FACES)
def test_no_module_takes_the_name_of_what_its_room_offers(room):
    """A module that is imported becomes an attribute of its package, and would hide a name that is imported later."""
    assert not {path.stem for path in (PACKAGE / room).iterdir()} & set(getattr(zsnr_diffusers, room).__all__)


@pytest.mark.parametrize("room", FACES)
def test_names_of_a_room_are_there(room):
    face = importlib.import_module(f"zsnr_diffusers.{room}")
    assert face.__all__ == sorted(face.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in face.__all__:
        assert getattr(face, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        face.nothing  # noqa: B018  # it is the asking that is tested

"""Faults reported to diffusers: the scripts that show them do so still, with the output that their index states."""

import re
import runpy
from pathlib import Path

import diffusers
import pytest
from pages import ROOT

FOLDER = Path(ROOT, "examples", "upstream")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def sections():
    """The index, by script."""
    text = Path(FOLDER, "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## \[`(\w+)\.py`\]\(\1\.py\)\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")  # diffusers' own, some of them part of the fault
def test_diffusers_has_the_fault(name, capsys):
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"))
    except Exception as error:  # of diffusers, or the script's assertion
        message = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}\n"
    else:
        pytest.skip(f"{name} is fixed in diffusers {diffusers.__version__}: take it off the list")
    if diffusers.__version__ == "0.42.1":
        assert f"```\n{capsys.readouterr().out}{message}```\n" in sections()[name]


def test_the_index_has_every_script():
    assert sorted(sections()) == SCRIPTS


def test_scripts_use_diffusers_alone():
    for name in SCRIPTS:
        text = Path(FOLDER, f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
        assert imported <= {"diffusers", "torch", "inspect", "json", "pathlib", "tempfile"}

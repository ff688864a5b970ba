"""The notebook runs from top to bottom at tiny sizes, and holds the outputs of a whole run at its own."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest
from pages import ROOT

NOTEBOOK = Path(ROOT, "examples", "notebooks", "tour.ipynb")
SIZES = "IMAGES, VAE_STEPS, TRAINING_STEPS, SEEDS = 600, 400, 600, 4"
TINY = "IMAGES, VAE_STEPS, TRAINING_STEPS, SEEDS = 40, 2, 2, 2"


def cells():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def last_line_is_shown(source):
    """Whether a cell ends with an expression, or draws."""
    return "print(" in source or "plt." in source or source.splitlines()[-1].startswith("show(")


def test_its_outputs_are_kept_and_no_cell_failed():
    shown = [cell for cell in cells() if last_line_is_shown("".join(cell["source"]))]
    assert len(shown) > 7
    for cell in shown:
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds & {"stream", "display_data", "execute_result"}, "".join(cell["source"])
    assert all(output["output_type"] != "error" for cell in cells() for output in cell["outputs"])
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))


@pytest.mark.full
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("zsnr_diffusers").symlink_to(ROOT)  # where an upload to Colab is
    sources = ["".join(cell["source"]) for cell in cells()]
    assert sum(SIZES in source for source in sources) == 1
    names = {}
    for number, source in enumerate(sources):
        small = source.replace(SIZES, TINY).replace('"num_inference_steps": 20', '"num_inference_steps": 2')
        exec(compile(small.replace(", 100)", ", 8)"), f"cell {number}", "exec"), names)
    text = capsys.readouterr().out
    assert "0.0683 by default, 0.0000 fixed" in text
    assert "works as published; not zero-SNR\nOK\n" in text
    assert names["grid"].size[1] > 6 * 64

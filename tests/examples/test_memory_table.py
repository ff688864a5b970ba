import re
from pathlib import Path

import memory_table
import pytest

from zsnr_diffusers.training.memory import LIBRARIES
from zsnr_diffusers.training.stable_diffusion.presets import PRESETS

EXAMPLES = Path(memory_table.__file__).parents[1]


@pytest.mark.full
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_the_gpus_that_they_are_for_and_the_guide_has_what_they_take(preset, capsys):
    """As a run is refused that does not."""
    (row,) = memory_table.main(["--configs", str(EXAMPLES / "configs" / "sd21.yaml"), "--preset", preset])
    assert row.estimate.total < PRESETS[preset].gigabytes * 1e9 - LIBRARIES
    total = f"| {row.estimate.total / 1e9:.1f} |"
    assert f"--preset {preset}`" in capsys.readouterr().out
    guide = (EXAMPLES / "guides" / "memory.md").read_text(encoding="utf-8")
    assert any(total in line for line in guide.splitlines() if f"--preset {preset}`" in line)


@pytest.mark.full
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/sd*-*gb.yaml")), ids=lambda path: path.stem)
def test_configurations_fit_the_gpus_that_they_are_named_after(path, capsys):
    (row,) = memory_table.main(["--configs", str(path)])
    size = int(re.search(r"-(\d+)gb", path.name)[1])
    assert row.estimate.total < (size - 3) * 1e9  # what libraries take
    assert f"| {row.estimate.total / 1e9:.1f} |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", memory_table.RESOLUTIONS)
def test_the_guide_has_the_table_that_is_printed(model, capsys):
    memory_table.main(["--models", model])
    guide = (EXAMPLES / "guides" / "memory.md").read_text(encoding="utf-8")
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {memory_table.NAMES[model]} at ")
    ]
    assert len(rows) == len(memory_table.ROWS)
    assert all(row in guide for row in rows)

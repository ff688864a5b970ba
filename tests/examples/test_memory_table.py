import re
from pathlib import Path

import memory_table
import pytest

EXAMPLES = Path(memory_table.__file__).parents[1]


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

"""The benchmark of starts: known files are not read, and what it prints is what it measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "data_start.py"


@pytest.mark.full
@pytest.mark.parametrize("layout", ["folder", "parquet", "tar"])
def test_it_starts_three_times_on_generated_rows(layout):
    command = [sys.executable, str(SCRIPT), "--layout", layout, "--rows", "1200"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    starts = re.findall(r"^(.+?): (\{.*\})$", done.stdout, re.MULTILINE)
    assert [name for name, _ in starts] == ["first start", "later start", "--rehash"]
    for _, facts in starts:
        found = json.loads(facts)
        assert found["rows"] == 1200
        assert found["peak_MB"] > 0
        assert ("hash" in found["seconds"]) == (layout == "folder")

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "guided_ablation.py"


def test_each_part_is_taken_out_and_put_back():
    """In a process of its own, since the benchmarks have an `oracles.py` as the tests do."""
    command = [sys.executable, SCRIPT, *["--guidance_scales", "7.5", "--steps", "5", "--samples", "2"]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = {name: float(error) for name, error in re.findall(r"^(\S.*?)  +(\S+)$", printed, re.MULTILINE)}
    assert len(errors) == len(set(errors.values())) == 9
    assert errors["no safeguard"] > 2 * errors["as it is"]
    assert errors["swings not averaged"] > errors["as it is"]

import re

import guided_ablation
import pytest


@pytest.mark.slow
def test_each_part_is_taken_out_and_put_back(schedule, capsys):
    guided_ablation.main(["--guidance_scales", "7.5", "--steps", "5", "--samples", "2"])
    printed = capsys.readouterr().out
    errors = {name: float(error) for name, error in re.findall(r"^(\S.*?)  +(\S+)$", printed, re.MULTILINE)}
    assert len(errors) == len(set(errors.values())) == 9
    assert errors["no safeguard"] > 2 * errors["as it is"]
    assert errors["swings not averaged"] > errors["as it is"]

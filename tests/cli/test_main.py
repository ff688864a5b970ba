import shlex
import subprocess
import sys

import pytest
from command_line import fill

from zsnr_diffusers.cli import COMMANDS, main, parse


@pytest.fixture
def real(tmp_path):
    return fill(tmp_path / "real", [0, 51, 102, 255])


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"]])
def test_help_teaches_by_example(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "zsnr evaluate --real photos/ --generated samples/" in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_every_example_of_the_help_parses(capsys):
    """Which is what people copy."""
    lines = []
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out.replace("\\\n", " ")
        lines += [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    zsnr ")]
    assert {line[0] for line in lines} == {*COMMANDS}
    for line in lines:
        parse(line)


def test_every_command_can_be_quiet(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--quiet" in capsys.readouterr().out


@pytest.mark.full
def test_as_a_process(tmp_path, real):
    command = [sys.executable, "-m", "zsnr_diffusers.cli", "evaluate", "--real", str(real)]
    done = subprocess.run([*command, "--generated", str(real)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["generated", "4"]
    # No progress bar where the output is not a terminal. bitsandbytes, which peft brings in, has a line of its own on
    # processors with bfloat16.
    assert [line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line] == []
    failed = subprocess.run(
        [*command, "--generated", str(tmp_path / "x")], capture_output=True, text=True, timeout=120
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "Traceback" not in failed.stderr

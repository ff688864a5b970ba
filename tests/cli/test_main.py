import shlex
import subprocess
import sys

import pytest
from command_line import fill

from zsnr_diffusers.cli import build_parser, main


@pytest.fixture
def real(tmp_path):
    return fill(tmp_path / "real", [0, 51, 102, 255])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["evaluate"],
        ["evaluate", "--real", "a"],
        ["evaluate", "--real", "a", "--generated", "b", "--pipeline", "c"],
        ["evaluate", "--real", "a", "--gen", "b"],
        ["evaluate", "--real", "a", "--generated", "b", "--on_bad_image", "ignore"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: zsnr" in capsys.readouterr().err


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
    names = ("audit", "calibrate", "convert", "encode", "evaluate", "extract-lora", "fit-start")
    for arguments in (["--help"], *([command, "--help"] for command in names)):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out.replace("\\\n", " ")
        lines += [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    zsnr ")]
    assert {line[0] for line in lines} == {*names}
    for line in lines:
        build_parser().parse_args(line)


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


@pytest.mark.full
def test_parser_needs_no_heavy_library():
    script = (
        "import sys; before = set(sys.modules); import zsnr_diffusers; package = set(sys.modules) - before\n"
        "import zsnr_diffusers.cli as cli; cli.build_parser()\n"
        "import zsnr_diffusers.evaluation; zsnr_diffusers.evaluation.launched_processes()\n"
        "heavy = {'scipy', 'matplotlib', 'tqdm', 'transformers', 'datasets', 'accelerate', 'rich'}\n"
        "new = set(sys.modules) - before - package\n"
        "assert not heavy & new, heavy & new\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

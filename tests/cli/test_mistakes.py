"""What is answered to a wrong command line: the nearest right one, in two lines, before anything is imported."""

import subprocess
import sys

import pytest
from pages import guide

from zsnr_diffusers.cli import COMMANDS, main
from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.training.cli import main as train

MISTAKES = {
    "": "the following arguments are required: COMMAND",
    "adit x": "COMMAND adit: choose one of {commands}; did you mean audit?",
    "--verison": "unknown option --verison; did you mean --version?",
    "audit model --plto x.png": "unknown option --plto; did you mean --plot?",
    "audit --dep model": "unknown option --dep; did you mean --deep?",
    "audit": "the following arguments are required: SOURCE",
    "convert a b --dtype fp16": "--dtype fp16: choose one of float32, float16, bfloat16; did you mean float16?",
    "calibrate m --prompt_file p --output_dir o": "unknown option --prompt_file; did you mean --prompts_file?",
    "evaluate --real a": "one of the arguments --generated --pipeline is required",
    "evaluate --real a --gen b": "unknown option --gen; did you mean --generated?",
    "evaluate --generated b --pipeline c": "argument --pipeline: not allowed with argument --generated",
    "evaluate --generated b --on_bad_image ignore": "--on_bad_image ignore: choose one of fail, skip",
    "train --lerning_rate 1": "unknown option --lerning_rate; did you mean --learning_rate?",
    "train --lora 16": "unknown option --lora; did you mean --lora_rank, --lora_weights, --lora_alpha or "
    "--lora_target_modules?",
    "train --mixed_precision bfloat16": "--mixed_precision bfloat16: choose one of no, fp16, bf16; did you mean bf16?",
    "train --max-train-steps many": "argument --max_train_steps: invalid int value: 'many'",
    "train --train_data_dir photos": "--pretrained_model_name_or_path is missing: a Hub id, a folder of a pipeline, "
    "or a .safetensors file.",
}
"""A command line, and the first of two lines that answer it, behind the command's name."""


ON_THE_PAGE = (
    *("adit x", "--verison", "audit model --plto x.png", "audit", "convert a b --dtype fp16"),
    *("calibrate m --prompt_file p --output_dir o", "evaluate --real a", "train --lerning_rate 1", "train --lora 16"),
    *("train --mixed_precision bfloat16", "train --train_data_dir photos"),
)
"""Those that the guide shows."""


def row(line):
    """A mistake and its answer as a row of the guide's table."""
    return f"| `zsnr {line}` | {MISTAKES[line].format(commands=', '.join(COMMANDS))} |"


def test_the_guide_shows_what_is_answered():
    page = guide("commands")
    assert [line for line in page.splitlines() if line in {*map(row, MISTAKES)}] == [*map(row, ON_THE_PAGE)]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_with_what_was_meant(line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    program = " ".join(["zsnr", *({line.partition(" ")[0]} & {*COMMANDS})])
    said = MISTAKES[line].format(commands=", ".join(COMMANDS))
    assert captured.err.splitlines() == [f"{program}: error: {said}", f"help: {program} --help"]
    assert captured.out == ""


@pytest.mark.parametrize(("kind", "program"), [(None, "training"), (PixelTrainingConfig, "training.pixels")])
def test_modules_of_training_answer_alike(kind, program, capsys):
    with pytest.raises(SystemExit) as stop:
        train(["--learning-rat", "1"], *filter(None, [kind]))
    assert stop.value.code == 2
    error, where = capsys.readouterr().err.splitlines()
    assert error.endswith("error: unknown option --learning-rat; did you mean --learning_rate?")
    assert where == f"help: python -m zsnr_diffusers.{program} --help"


def test_one_process_of_several_answers(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        train(["--seeed", "1"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "zsnr_diffusers", "--help"],
        ["-m", "zsnr_diffusers", "adit"],
        *(["-m", "zsnr_diffusers", command, "--help"] for command in COMMANDS),
        ["-m", "zsnr_diffusers.training", "--train_data_dir", "photos"],
        ["-m", "zsnr_diffusers.training.pixels", "--help"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]),
)
def test_what_is_answered_at_once_imports_no_heavy_library(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 2)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "zsnr_diffusers" in imported
    assert not imported & {"torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "PIL", "rich"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("audit nothing --plot a.bmpx", "--plot 'a.bmpx': use a file name that ends in one of ."),
        ("evaluate --real a --generated b --plot a", "--plot 'a': use a file name that ends in one of "),
        ("calibrate a --prompts_file no.txt --output_dir b", "--prompts_file 'no.txt': no such file"),
    ],
)
def test_refused_before_anything_is_looked_for(line, said, capsys):
    assert main(line.split()) == 2
    assert f"zsnr {line.partition(' ')[0]}: error: {said}" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("zsnr_diffusers 0.")

"""A run does not depend on how its global batch is divided over processes and forward passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import arguments, exit_code, start_ranks
from training_runs import logged

from zsnr_diffusers.training import TrainingConfig, objective, train

GLOBAL_BATCH = 4
DIVISIONS = [(1, 4), (2, 2), (4, 1)]
"""(processes, forward passes) of a step."""


@pytest.fixture
def options(options):
    """A global batch in one piece, with all that is drawn or learned over the whole of it."""
    together = {"timestep_sampling": "stratified", "loss_weighting": "learned_uncertainty"}
    return {**options, **together, "report_to": "tensorboard", "logging_steps": 4, "train_batch_size": GLOBAL_BATCH}


def divided(options, processes, passes, **changes):
    batch = GLOBAL_BATCH // (processes * passes)
    return {**options, "train_batch_size": batch, "gradient_accumulation_steps": passes, **changes}


def run_divided(options, folder, processes, passes, prepare=None, **changes):
    """Run it in as many processes; what each of them said."""
    folder.mkdir(exist_ok=True)
    ranks = start_ranks(divided(options, processes, passes, **changes), folder, prepare, processes)
    said = [(exit_code(rank), Path(folder, f"rank{number}.log").read_text()) for number, rank in enumerate(ranks)]
    assert [code for code, _ in said] == [0] * processes, said
    return [text for _, text in said]


def losses(folder, tag="loss"):
    return [value for _, value in logged(folder)[tag]]


def same_losses(folder, other, tag="loss"):
    # The sum over a batch is taken in another order; float32 keeps seven digits.
    assert losses(folder, tag) == pytest.approx(losses(other, tag), rel=3e-6, abs=1e-6)


def print_noise():
    """Let a process print a number of the noise of each of its samples."""
    add_noise = objective.add_noise

    def printing(x_0, noise, level):
        print(*(f"noise {one:.8f}\n" for one in noise.flatten(1)[:, 0].tolist()), sep="", end="", flush=True)
        return add_noise(x_0, noise, level)

    objective.add_noise = printing


def noise_of(text):
    return re.findall(r"noise (-?\d+\.\d{8})", text)  # a progress bar may stand on the same line


@pytest.mark.full
def test_losses_and_noise_are_those_of_one_process_and_pass(options, tmp_path):
    (alone,) = run_divided(options, tmp_path / "alone", 1, 1, print_noise)
    expected = noise_of(alone)
    assert len(set(expected)) == 4 * GLOBAL_BATCH
    for processes, passes in DIVISIONS:
        folder = tmp_path / f"{processes}x{passes}"
        said = run_divided(options, folder, processes, passes, print_noise, output_dir=str(folder / "run"))
        assert f"{GLOBAL_BATCH} = {GLOBAL_BATCH // (processes * passes)} x {passes} forward passes" in said[0]
        same_losses(folder / "run", options["output_dir"])
        same_losses(folder / "run", options["output_dir"], "loss/t000-099")
        assert sorted(one for text in said for one in noise_of(text)) == sorted(expected)


@pytest.mark.full
def test_goes_on_with_another_number_of_processes(options, tmp_path):
    options |= {"max_train_steps": 6, "checkpointing_steps": 1}
    train(TrainingConfig(**options))
    cut = {"output_dir": str(tmp_path / "cut"), "resume": True}
    for steps, processes in ((2, 2), (3, 4), (6, 1)):
        said = run_divided(options, tmp_path / "logs", processes, 1, max_train_steps=steps, **cut)
    assert "continuing from checkpoint-000003" in said[0]
    same_losses(tmp_path / "cut", options["output_dir"])


@pytest.mark.full
def test_as_accelerate_launches_it(options, tmp_path):
    train(TrainingConfig(**options))
    launch = "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"
    result = subprocess.run(
        [
            *(sys.executable, "-m", *launch.split(), "--dynamo_backend=no", "--main_process_port=0"),
            *("-m", "zsnr_diffusers.training"),
            *arguments(divided(options, 2, 1, output_dir=tmp_path / "two")),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "4 = 2 x 1 forward passes x 2 processes" in result.stdout
    same_losses(tmp_path / "two", options["output_dir"])

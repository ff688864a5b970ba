"""Runs that are killed, stopped and starved while a thread writes a checkpoint."""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest
from child_processes import exit_code, kill, start, start_ranks, wait_until
from safetensors.torch import load_file

from zsnr_diffusers.training import TrainingConfig, train, trainer
from zsnr_diffusers.training.checkpointing import checkpoint as checkpoints
from zsnr_diffusers.training.checkpointing.checkpoint import checkpoint_step, find_corruption, list_checkpoints

EVERY = 2
"""Steps between checkpoints."""


@pytest.fixture
def options(options):
    return {**options, "max_train_steps": 12, "checkpointing_steps": EVERY, "validation_steps": 100}


def slow_writes():
    """Let every file of a checkpoint take a second, and every forward pass say that it was made."""
    write, v_loss = checkpoints.write_tensor_file, trainer.v_loss

    def slow(*args):
        time.sleep(0.5)
        written = write(*args)
        time.sleep(0.5)
        return written

    def saying(*args):
        print("a pass", flush=True)
        return v_loss(*args)

    checkpoints.write_tensor_file, trainer.v_loss = slow, saying


def full_disk():
    """Let the disk be full from the second checkpoint on."""
    write, calls = checkpoints.write_tensor_file, itertools.count()

    def full(*args):
        if next(calls) >= 3:
            raise OSError(28, "No space left on device")
        return write(*args)

    checkpoints.write_tensor_file = full


def text(log):
    return log.read_text() if log.exists() else ""


def being_written(folder):
    """Steps of the checkpoints that are half written."""
    newest = max(map(checkpoint_step, list_checkpoints(folder)), default=0)
    steps = [int(re.findall(r"\d+", path.name)[0]) for path in folder.glob(".checkpoint-*.partial")]
    return [step for step in steps if step > newest]


def contents(folder):
    last = list_checkpoints(folder)[-1]
    return last.name, {
        (file.name, name): value.numpy().tobytes()
        for file in last.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.full
def test_killed_while_it_writes_and_trains_it_goes_on_bit_for_bit(options, tmp_path):
    """Each kill comes when a later step has been made and the checkpoint of an earlier one is half written."""
    train(TrainingConfig(**{**options, "output_dir": str(tmp_path / "whole"), "async_checkpointing": False}))
    folder, log = Path(options["output_dir"]), tmp_path / "log"
    for delay in (0.0, 0.4, 0.9):
        log.unlink(missing_ok=True)
        before = max(map(checkpoint_step, list_checkpoints(folder)), default=0) if folder.exists() else 0
        process = start({**options, "resume": True}, log, prepare=slow_writes)

        def trained_beyond(before=before):
            writing = being_written(folder)
            return writing and before + text(log).count("a pass") > writing[0] + 1  # a pass ends its step

        assert wait_until(trained_beyond, process), text(log)
        time.sleep(delay)
        assert being_written(folder)
        kill(process.pid)
        assert exit_code(process) == -signal.SIGKILL
        assert all(find_corruption(one) is None for one in list_checkpoints(folder))
        # What makes a next kill come later.
        assert exit_code(start({**options, "resume": True, "max_train_steps": before + EVERY}, log)) == 0
    assert exit_code(start({**options, "resume": True}, log)) == 0
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.full
def test_a_signal_waits_for_what_is_being_written_and_writes_its_own(options, tmp_path):
    folder, log = Path(options["output_dir"]), tmp_path / "log"
    process = start(options, log, prepare=slow_writes)
    assert wait_until(lambda: being_written(folder), process), text(log)
    (step,) = being_written(folder)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process) == 143
    steps = [checkpoint_step(one) for one in list_checkpoints(folder)]
    assert steps[0] == step
    assert steps[1] in (step + 1, step + 2)
    assert all(find_corruption(one) is None for one in list_checkpoints(folder))
    assert not being_written(folder)


@pytest.mark.full
def test_a_full_disk_ends_all_processes_with_its_message(options, tmp_path):
    ranks = start_ranks({**options, "train_batch_size": 1, "max_train_steps": 1000}, tmp_path, prepare=full_disk)
    assert [exit_code(rank) for rank in ranks] == [1, 1]
    said = (tmp_path / "rank0.log").read_text()
    assert "The checkpoint of step 4 could not be written: [Errno 28] No space left" in said
    assert "The last good one is checkpoint-000002" in said
    assert [one.name for one in list_checkpoints(Path(options["output_dir"]))] == ["checkpoint-000002"]


def test_a_step_that_is_not_finite_names_the_checkpoint_that_was_being_written(options, monkeypatch):
    from zsnr_diffusers.training import TrainingError

    write, v_loss, calls = checkpoints.write_tensor_file, trainer.v_loss, itertools.count(1)
    monkeypatch.setattr(checkpoints, "write_tensor_file", lambda *args: time.sleep(0.3) or write(*args))
    monkeypatch.setattr(trainer, "v_loss", lambda *a: v_loss(*a) * (float("nan") if next(calls) == 3 else 1))
    with pytest.raises(TrainingError, match=r"step 3 .* is .*checkpoint-000002"):
        train(TrainingConfig(**options))
    assert find_corruption(Path(options["output_dir"], "checkpoint-000002")) is None

"""Runs that are stopped, killed, damaged and starved, and what becomes of them."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from child_processes import (
    arguments,
    children,
    exit_code,
    free_port,
    kill,
    slow_steps,
    slow_syncs,
    start,
    start_ranks,
    wait_until,
)
from kill_trials import half_written
from safetensors.torch import load_file

import zsnr_diffusers.training.run as run_module
from zsnr_diffusers.training import TrainingConfig, TrainingError, TrainingInterrupted, main, train, trainer
from zsnr_diffusers.training.checkpointing.checkpoint import checkpoint_step, find_corruption, list_checkpoints


def run(options, **changes):
    train(TrainingConfig(**{**options, **changes}))
    return result(changes.get("output_dir", options["output_dir"]))


def result(folder):
    """All that a run comes to: the network that is shipped, and the bytes of its last checkpoint."""
    last = list_checkpoints(Path(folder))[-1]
    shipped = load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")
    assert {"unet.safetensors", "ema.safetensors", "optimizer.safetensors"} <= set(os.listdir(last))
    return last.name, tensors(last), {name: value.numpy().tobytes() for name, value in shipped.items()}


def tensors(checkpoint):
    """Bytes of weights, moving average and Adam's state by name: files may differ in the order of names."""
    return {
        (file.name, name): value.numpy().tobytes()
        for file in checkpoint.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def names(options):
    return [path.name for path in list_checkpoints(Path(options["output_dir"]))]


def text(log):
    return log.read_text() if log.exists() else ""


def call_at(monkeypatch, numbers, function):
    """Call a function within the loss of some forward passes, the first being 1; it returns a factor of the loss."""
    calls, v_loss = itertools.count(1), trainer.v_loss

    def loss(*args):
        return v_loss(*args) * (function() if next(calls) in numbers else 1)

    monkeypatch.setattr(trainer, "v_loss", loss)


# -- stopped


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stops"), [(0, (1, 2, 3, 4)), (2, (2,))])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_after_any_step_is_bitwise_the_uninterrupted_run(
    options, tmp_path, monkeypatch, accumulation, workers, stops
):
    options |= {"max_train_steps": 5, "gradient_accumulation_steps": accumulation, "lr_scheduler": "cosine"}
    options |= {"dataloader_num_workers": workers, "checkpointing_steps": 100}
    whole = run(options, output_dir=str(tmp_path / "whole"))
    for stop in stops:
        folder = str(tmp_path / f"stopped at {stop}")
        with monkeypatch.context() as patch:
            # In the first of the step's forward passes: the others must still come.
            first_pass = (stop - 1) * accumulation + 1
            call_at(patch, [first_pass], lambda: os.kill(os.getpid(), signal.SIGTERM) or 1)
            with pytest.raises(TrainingInterrupted) as stopped:
                run(options, output_dir=folder)
        assert stopped.value.code == 143
        assert names({"output_dir": folder}) == [f"checkpoint-{stop:06d}"]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", None)  # reads pickles
            assert run(options, output_dir=folder, resume=True) == whole


def test_stopped_where_there_is_a_checkpoint_already_and_at_the_last_step(options, monkeypatch, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        call_at(patch, [2, 6], lambda: os.kill(os.getpid(), signal.SIGINT) or 1)
        with pytest.raises(TrainingInterrupted) as stopped:
            run(options)
        assert stopped.value.code == 130
        assert names(options) == ["checkpoint-000002"]
        assert "Stopped after step 2; the last good checkpoint is" in capsys.readouterr().out
        call_at(patch, [2], lambda: os.kill(os.getpid(), signal.SIGINT) or 1)
        run(options, resume=True)  # nothing is left to stop
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_command_with_a_checkpoint(options, tmp_path, number, code):
    """And its workers, which a terminal signals too, do not end before it."""
    options |= {"max_train_steps": 1000, "checkpointing_steps": 1000, "dataloader_num_workers": 2}
    process = start(options, tmp_path / "log", prepare=slow_steps)
    assert wait_until(lambda: " 1/1000" in text(tmp_path / "log"), process)
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, number)
    assert exit_code(process) == code
    assert len(names(options)) == 1
    assert f"{number.name}: stopping after this step" in text(tmp_path / "log")
    assert "Traceback" not in text(tmp_path / "log")
    process = start(
        {**options, "resume": True, "max_train_steps": checkpoint_step(Path(*names(options))) + 1}, tmp_path / "log"
    )
    assert exit_code(process) == 0


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_command_at_once(options, tmp_path, number, code):
    process = start(options, tmp_path / "log", prepare=endless_step)
    assert wait_until(lambda: "in the step" in text(tmp_path / "log"), process)
    os.kill(process.pid, number)
    time.sleep(1.5)
    assert process.exitcode is None
    os.kill(process.pid, number)
    assert exit_code(process, seconds=30) == code
    assert names(options) == []


def endless_step():
    def wait(*args):
        print("in the step", flush=True)
        while True:
            time.sleep(0.01)

    trainer.v_loss = wait


@pytest.mark.full
def test_processes_stop_after_the_same_step_and_go_on_bit_for_bit(options, tmp_path):
    options |= {"train_batch_size": 1, "max_train_steps": 30, "checkpointing_steps": 1000}
    ranks = start_ranks(options, tmp_path, prepare=slow_steps)
    assert wait_until(lambda: " 1/30" in text(tmp_path / "rank0.log"), *ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)  # one of them alone
    assert [exit_code(rank) for rank in ranks] == [143, 143]
    (stopped,) = names(options)
    last = checkpoint_step(Path(stopped)) + 2
    for folder in (options["output_dir"], str(tmp_path / "whole")):
        changes = {"output_dir": folder, "max_train_steps": last, "resume": True}
        assert [exit_code(rank) for rank in start_ranks({**options, **changes}, tmp_path)] == [0, 0]
    assert result(options["output_dir"]) == result(tmp_path / "whole")


# -- killed


def kill_and_resume(options, log, kills, seed=0):
    """SIGKILL a run many times, every other time in the midst of a checkpoint.

    Returns:
        How many times a checkpoint was half written.
    """
    folder, draw, inside = Path(options["output_dir"]), random.Random(seed), 0
    for number in range(kills):
        log.unlink(missing_ok=True)
        process = start({**options, "resume": True}, log, prepare=slow_syncs)
        assert wait_until(lambda: "training:" in text(log), process), text(log)
        if number % 2:
            time.sleep(draw.uniform(0, 0.5))
        done = len(half_written(folder))
        if not number % 2:
            assert wait_until(lambda done=done: len(half_written(folder)) > done, process), text(log)
            time.sleep(draw.uniform(0, 0.15))
        kill(process.pid)
        assert exit_code(process) == -signal.SIGKILL
        inside += bool(half_written(folder))
        assert all(find_corruption(checkpoint) is None for checkpoint in list_checkpoints(folder))
    assert exit_code(start({**options, "resume": True}, log)) == 0
    assert not list(folder.glob(".checkpoint-*"))
    return inside


@pytest.mark.full
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path):
    options |= {"max_train_steps": 20, "checkpointing_steps": 1, "validation_steps": 100}
    whole = run(options, output_dir=str(tmp_path / "whole"))
    assert kill_and_resume(options, tmp_path / "log", kills=5) >= 2
    assert result(options["output_dir"]) == whole


@pytest.mark.slow
def test_killed_sixty_times_and_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path):
    options |= {"max_train_steps": 200, "checkpointing_steps": 1, "validation_steps": 100}
    options |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    whole = run(options, output_dir=str(tmp_path / "whole"))
    inside = kill_and_resume(options, tmp_path / "log", kills=60, seed=1)
    print(f"60 kills, {inside} of them inside a checkpoint write")
    assert inside >= 10
    assert result(options["output_dir"]) == whole


@pytest.mark.full
def test_two_runs_do_not_write_to_one_folder_and_a_killed_one_does_not_block_it(options, tmp_path):
    options |= {"checkpointing_steps": 1, "dataloader_num_workers": 1, "resume": True}
    first = start({**options, "max_train_steps": 1000}, tmp_path / "log", prepare=slow_steps)
    assert wait_until(lambda: names(options), first)
    second = start(options, tmp_path / "second")
    assert exit_code(second) == 1
    assert f"is in use by process {first.pid} on " in text(tmp_path / "second")
    kill(first.pid)
    assert exit_code(first) == -signal.SIGKILL
    last = checkpoint_step(Path(names(options)[-1])) + 1
    assert exit_code(start({**options, "max_train_steps": last}, tmp_path / "third")) == 0


@pytest.mark.full
def test_a_killed_worker_ends_the_run(options, tmp_path):
    options |= {"max_train_steps": 1000, "dataloader_num_workers": 2}
    process = start(options, tmp_path / "log", prepare=slow_steps)
    assert wait_until(lambda: names(options), process)
    kill(children(process.pid)[0])
    assert exit_code(process, seconds=60) == 1
    log = text(tmp_path / "log")
    assert "error: At step " in log
    assert "DataLoader worker" in log  # in torch's words, or in ours where a batch was on its way
    assert f"the last good checkpoint is {Path(options['output_dir'])}/checkpoint-" in log


@pytest.mark.full
@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_as_it_sends_a_batch_is_named(options, monkeypatch, broken):
    """It shows in the connection before torch hears of the death; without workers nothing is guessed."""

    def fail(run, batches):
        raise broken

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    with pytest.raises(
        TrainingError, match=r"At step 1: a DataLoader worker died while sending a batch \((\[Errno|EOFE)"
    ):
        run(options, dataloader_num_workers=2)
    with pytest.raises(type(broken)):
        run(options, output_dir=options["output_dir"] + "2")


@pytest.mark.full
def test_a_killed_process_ends_the_others(options, tmp_path):
    options |= {"train_batch_size": 1, "max_train_steps": 1000}
    ranks = start_ranks(options, tmp_path, prepare=slow_steps)
    assert wait_until(lambda: names(options), *ranks)
    kill(ranks[1].pid)
    assert exit_code(ranks[0], seconds=60) not in (0, None)
    assert names(options)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_launcher(options, tmp_path, victim):
    options |= {"train_batch_size": 1, "max_train_steps": 100_000, "checkpointing_steps": 2}
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"),
            *("-m", "zsnr_diffusers.training", *arguments(options)),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: names(options) or launcher.poll() is not None)
        ranks = sorted(children(launcher.pid))
        started = time.monotonic()
        kill(ranks[victim])
        assert launcher.wait(60) != 0
    finally:
        launcher.terminate()
        launcher.wait()
    print(f"the launcher ended {time.monotonic() - started:.1f} s after process {victim} was killed")


# -- damaged


def test_a_damaged_checkpoint_is_named_kept_and_passed_over(options, tmp_path, capsys):
    options |= {"max_train_steps": 6}
    whole = run(options, output_dir=str(tmp_path / "whole"))
    run(options, max_train_steps=4)
    file = Path(options["output_dir"], "checkpoint-000004", "optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert run(options, resume=True) == whole
    said = capsys.readouterr().out
    assert "checkpoint-000004 is damaged and was skipped: optimizer.safetensors has " in said
    assert "It was renamed to checkpoint-000004.broken" in said
    assert "continuing from checkpoint-000002" in said
    assert names(options) == ["checkpoint-000004", "checkpoint-000006"]
    assert Path(options["output_dir"], "checkpoint-000004.broken").is_dir()


def test_where_no_checkpoint_is_whole_nothing_is_touched(options):
    run(options)
    for checkpoint in list_checkpoints(Path(options["output_dir"])):
        (checkpoint / "unet.safetensors").write_bytes(b"")
    before = sorted(os.listdir(options["output_dir"]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"No checkpoint in .* is valid"):
            run(options, resume=True)
    assert sorted(os.listdir(options["output_dir"])) == before


def test_a_dry_run_names_damage_and_renames_nothing(options, capsys):
    run(options)
    Path(options["output_dir"], "checkpoint-000004", "unet.safetensors").unlink()
    train(TrainingConfig(**{**options, "resume": True, "dry_run": True}))
    assert "unet.safetensors is missing. It was renamed to checkpoint-000004." in capsys.readouterr().out
    assert names(options) == ["checkpoint-000002", "checkpoint-000004"]


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(options, monkeypatch):
    from zsnr_diffusers.training.checkpointing import checkpoint as module

    write, calls = module.write_tensor_file, itertools.count()

    def full(*args):
        if next(calls) == 4:  # of the second checkpoint's three
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(module, "write_tensor_file", full)
    with pytest.raises(TrainingError, match=r"step 4 could not be written: .* No space left .* is checkpoint-000002"):
        run(options)
    assert names(options) == ["checkpoint-000002"]
    assert not list(Path(options["output_dir"]).glob(".*"))
    run(options, resume=True)


# -- not finite


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_stops_before_the_update_and_names_step_rows_and_checkpoint(options, monkeypatch, value):
    with monkeypatch.context() as patch:
        call_at(patch, [3], lambda: float(value))
        with pytest.raises(
            TrainingError, match=rf"step 3 the loss was {value}.*not updated.*checkpoint-000002"
        ) as error:
            run(options)
    assert "--learning_rate" in str(error.value)
    assert "--resume" in str(error.value)
    assert named_rows(error.value) == rows(options, steps=[2])
    assert names(options) == ["checkpoint-000002"]
    assert not Path(options["output_dir"], "model_index.json").exists()
    run(options, resume=True)


def named_rows(error):
    listed = str(error).split("contained the rows ")[1].split(". Lower")[0]
    return [int(name.split(" ")[0]) for name in listed.split(", ")]


def rows(options, steps):
    """The rows of some steps, read off the samples of another run."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from zsnr_diffusers.training.stable_diffusion.samples import CaptionedDataset

        sample = CaptionedDataset.sample
        patch.setattr(CaptionedDataset, "sample", lambda self, i, draw: seen.append(i) or sample(self, i, draw))
        run(options, output_dir=f"{options['output_dir']} again")
    size = options["train_batch_size"]
    return [row for step in steps for row in seen[step * size : (step + 1) * size]]


def test_the_command_ends_with_an_error_after_nan(options, monkeypatch):
    call_at(monkeypatch, [1], lambda: float("nan"))
    with pytest.raises(SystemExit, match=r"error: At step 1 the loss was nan.*there is no checkpoint yet.*00006\.png"):
        main(arguments(options))


@pytest.mark.full
def test_steps_of_nan_are_left_out_up_to_a_number_in_a_row(options, monkeypatch, capsys):
    options |= {"max_train_steps": 8, "nan_skip": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 8}
    with monkeypatch.context() as patch:
        call_at(patch, [2, 3, 5], lambda: float("nan"))
        run(options)
    assert "At step 3 the loss was nan" in capsys.readouterr().out
    state = [tensors(checkpoint) for checkpoint in list_checkpoints(Path(options["output_dir"]))]
    same = [a == b for a, b in itertools.pairwise(state)]
    assert same == [True, True, False, True, False, False, False]


@pytest.mark.full
def test_too_many_steps_of_nan_in_a_row_stop_the_run_also_across_an_interruption(options, monkeypatch):
    options |= {"max_train_steps": 8, "nan_skip": 2, "checkpointing_steps": 1}
    with monkeypatch.context() as patch:
        call_at(patch, [3, 4, 5], lambda: float("nan"))
        with pytest.raises(TrainingError, match=r"At step 5 .*checkpoint-000004"):
            run(options)
    with monkeypatch.context() as patch:
        call_at(patch, [1], lambda: float("nan"))
        with pytest.raises(TrainingError, match="At step 5 "):
            run(options, resume=True)
    run(options, resume=True)


def test_a_step_left_out_is_left_out_by_moments_and_moving_average_too(options, tmp_path, monkeypatch):
    """What remains is a run whose optimizer never saw the step."""
    with monkeypatch.context() as patch:
        call_at(patch, [2], lambda: float("nan"))
        run(options, nan_skip=1, checkpointing_steps=1, checkpoints_total_limit=9)
    steps = [value for (file, name), value in last(options).items() if name.endswith(".step")]
    assert {torch.frombuffer(bytearray(value), dtype=torch.float32).item() for value in steps} == {3.0}
    assert '"ema_steps": 3' in (list_checkpoints(Path(options["output_dir"]))[-1] / "numbers.json").read_text()


def last(options):
    return tensors(list_checkpoints(Path(options["output_dir"]))[-1])


@pytest.fixture
def _float16(monkeypatch):
    """accelerate as it is under float16, with torch's scaler for CPUs."""
    launch = run_module.create_accelerator

    def launch_with_scaler(*args, **kwargs):
        AcceleratorState._reset_state(True)  # what was set here for the run before
        accelerator, processes = launch(*args, **kwargs)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        return accelerator, processes

    monkeypatch.setattr(run_module, "create_accelerator", launch_with_scaler)


@pytest.mark.full
@pytest.mark.usefixtures("_float16")
def test_the_scaler_of_float16_goes_on_and_may_leave_out_a_step(options, tmp_path, monkeypatch):
    """An infinite gradient is left to the scaler, whose state is in the checkpoint; a loss of NaN counts."""
    with monkeypatch.context() as patch:
        call_at(patch, [2], lambda: 1e38)  # overflows once it is scaled
        whole = run(options, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        call_at(patch, [2], lambda: 1e38)
        call_at(patch, [3], lambda: os.kill(os.getpid(), signal.SIGTERM) or 1)
        with pytest.raises(TrainingInterrupted):
            run(options)
    assert run(options, resume=True) == whole
    numbers = (list_checkpoints(Path(options["output_dir"]))[-1] / "numbers.json").read_text()
    assert '"scale": 65536.0' in numbers  # halved at step 2, doubled after steps 3 and 4
    with monkeypatch.context() as patch:
        call_at(patch, [1], lambda: float("nan"))
        run(options, resume=True, max_train_steps=6, nan_skip=1)

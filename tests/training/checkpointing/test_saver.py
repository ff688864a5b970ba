"""Checkpoints written in the background, on tensors that change meanwhile."""

import threading

import pytest
import torch

from zsnr_diffusers.training import TrainingError
from zsnr_diffusers.training.checkpointing import checkpoint as checkpoints
from zsnr_diffusers.training.checkpointing import saver as module
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints, read_checkpoint
from zsnr_diffusers.training.checkpointing.saver import CheckpointSaver
from zsnr_diffusers.utils.distributed import Processes

SECONDS = 60
"""After which a test that waits for something fails."""


class Gate:
    """Holds every write of a file until it is opened; counts how many are under way at once."""

    def __init__(self, monkeypatch):
        self.open, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = self.written = 0
        self._write = checkpoints.write_tensor_file
        monkeypatch.setattr(checkpoints, "write_tensor_file", self)

    def __call__(self, *args):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.open.wait(SECONDS)
        result = self._write(*args)
        self.inside, self.written = self.inside - 1, self.written + 1
        return result


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def background(last=None):
    return CheckpointSaver(Processes(), last, in_background=True)


def save(saver, folder, step, value, limit=9):
    saver.save(folder, step, {"unet": {"weight": value}, "optimizer": {}}, {"step": step}, limit)


def test_training_goes_on_and_the_file_has_what_was_there(tmp_path, gate):
    saver, weight = background(), torch.zeros(3)
    save(saver, tmp_path, 1, weight)  # returns although nothing can be written
    assert gate.entered.wait(SECONDS)
    weight += 1
    assert list_checkpoints(tmp_path) == []
    gate.open.set()
    saver.wait()
    (found,) = list_checkpoints(tmp_path)
    tensors, numbers = read_checkpoint(found)
    assert torch.equal(tensors["unet"]["weight"], torch.zeros(3))
    assert numbers == {"step": 1}


def test_one_is_written_at_a_time_each_as_it_was(tmp_path, gate):
    saver, weight = background(), torch.zeros(3)
    save(saver, tmp_path, 1, weight)
    assert gate.entered.wait(SECONDS)
    threading.Timer(0.1, gate.open.set).start()
    for step in range(2, 5):
        weight += 1
        save(saver, tmp_path, step, weight)
    saver.wait()
    kept = [read_checkpoint(found)[0]["unet"]["weight"][0].item() for found in list_checkpoints(tmp_path)]
    assert kept == [0, 1, 2, 3]
    assert gate.most == 1


def test_a_failure_is_known_between_steps_and_raised_once(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    saver = background(tmp_path / "checkpoint-000001")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensor_file", full)
        assert not saver.failed
        save(saver, tmp_path, 2, torch.zeros(1))
        saver.settle()
    assert saver.failed
    assert "is " + str(tmp_path / "checkpoint-000001") in saver.describe_last()
    assert "step 2 could not be written: [Errno 28] No space left" in saver.describe_last()
    with pytest.raises(TrainingError, match="step 2 could not be written"):
        save(saver, tmp_path, 3, torch.zeros(1))
    assert list_checkpoints(tmp_path) == []
    save(saver, tmp_path, 4, torch.zeros(1))
    saver.wait()
    assert saver.describe_last() == f"the last good checkpoint is {tmp_path / 'checkpoint-000004'}"


def test_what_is_not_finite_is_an_error_of_the_thread(tmp_path):
    saver = background()
    save(saver, tmp_path, 1, torch.tensor([float("nan")]))
    with pytest.raises(TrainingError, match="After step 1, weight of unet is not finite"):
        saver.wait()


def test_words_wait_for_the_one_that_is_written(tmp_path, gate):
    saver = background()
    save(saver, tmp_path, 1, torch.zeros(1))
    threading.Timer(0.1, gate.open.set).start()
    assert saver.describe_last().endswith("checkpoint-000001")
    assert background().describe_last() == "there is no checkpoint yet"


@pytest.mark.parametrize("why", ["asked for", "no memory"])
def test_written_at_once_where_asked_for_or_where_the_host_has_no_room(tmp_path, monkeypatch, capsys, why):
    if why == "no memory":
        monkeypatch.setattr(module, "free_host_memory", lambda: 14)
    saver, threads = CheckpointSaver(Processes(), None, why == "no memory"), []
    write = checkpoints.write_tensor_file
    monkeypatch.setattr(
        checkpoints, "write_tensor_file", lambda *args: threads.append(threading.current_thread()) or write(*args)
    )
    for step in (1, 2):
        save(saver, tmp_path, step, torch.zeros(3))
    assert set(threads) == {threading.main_thread()}
    assert len(list_checkpoints(tmp_path)) == 2
    assert capsys.readouterr().out.count("are written while training waits") == (why == "no memory")

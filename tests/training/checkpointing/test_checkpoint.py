import errno
import itertools
import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from zsnr_diffusers.training import TrainingError
from zsnr_diffusers.training.checkpointing import checkpoint as checkpoints
from zsnr_diffusers.training.checkpointing.checkpoint import (
    find_corruption,
    latest_valid,
    quarantine,
    read_checkpoint,
    remove_partial_checkpoints,
    write_checkpoint,
)
from zsnr_diffusers.utils import files

TENSORS = {
    "unet": {"conv_in.weight": torch.linspace(0, 1, 24).reshape(2, 3, 4), "conv_in.bias": torch.ones(2)},
    "ema": {"conv_in.weight": torch.zeros(2, 3, 4), "conv_in.bias": torch.ones(2)},
    "optimizer": {"unet.conv_in.bias.exp_avg": torch.full((2,), 1e-30), "unet.conv_in.bias.step": torch.tensor(6.0)},
}
NUMBERS = {"ema_steps": 6, "scaler": {"scale": 65536.0}}
FILES = ["ema.safetensors", "manifest.json", "numbers.json", "optimizer.safetensors", "unet.safetensors"]


def write(folder, step, limit=3):
    return write_checkpoint(folder, step, TENSORS, NUMBERS, limit)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for step in (2, 4, 6):
        write(folder, step)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """Of a run with checkpoints of steps 2, 4 and 6."""
    return shutil.copytree(written, tmp_path / "run")


def names(folder):
    return [path.name for path in checkpoints.list_checkpoints(folder)]


def test_what_was_written_is_read(folder):
    tensors, numbers = read_checkpoint(folder / "checkpoint-000006")
    assert numbers == NUMBERS
    assert tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert tensors[name].keys() == values.keys()
        assert all(torch.equal(tensors[name][key], value) for key, value in values.items())


def test_nothing_in_it_is_a_pickle(folder):
    assert sorted(path.name for path in (folder / "checkpoint-000006").iterdir()) == FILES


def test_tensors_in_any_memory_order_are_written(tmp_path):
    value = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    checkpoint = write_checkpoint(tmp_path, 1, {"unet": {"a": value}}, {}, 1)
    assert torch.equal(read_checkpoint(checkpoint)[0]["unet"]["a"], value)


def test_the_newest_are_kept(folder):
    write(folder, 8, limit=2)
    assert names(folder) == ["checkpoint-000006", "checkpoint-000008"]
    assert sorted(os.listdir(folder)) == names(folder)


def test_there_never_was_one(tmp_path):
    assert latest_valid(tmp_path) == (None, {})
    assert latest_valid(tmp_path / "nowhere") == (None, {})


# -- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file, bit=None):
    content = bytearray(file.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, empty, flip, zero, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_the_next_older_is_taken_where_the_newest_is_damaged(folder, name, damage):
    newest = folder / "checkpoint-000006"
    damage(newest / name)
    found, damaged = latest_valid(folder)
    assert found == folder / "checkpoint-000004"
    assert list(damaged) == [newest]
    assert name in damaged[newest]


def test_a_flipped_bit_is_noticed_or_means_nothing(folder):
    checkpoint, draw = folder / "checkpoint-000006", random.Random(0)
    for name in FILES:
        content = (checkpoint / name).read_bytes()
        for byte in range(0, len(content), 1 if name == "manifest.json" else 5):
            flip(checkpoint / name, 8 * byte + draw.randrange(8))
            if find_corruption(checkpoint) is None:
                assert name == "manifest.json"  # white space
                assert json.loads((checkpoint / name).read_bytes()) == json.loads(content)
            (checkpoint / name).write_bytes(content)
    assert find_corruption(checkpoint) is None


def test_a_checkpoint_under_another_one_s_name_is_not_taken(folder):
    shutil.copytree(folder / "checkpoint-000002", folder / "checkpoint-000008")
    found, damaged = latest_valid(folder)
    assert found == folder / "checkpoint-000006"
    assert damaged == {folder / "checkpoint-000008": "manifest.json is of step 2"}


def test_an_empty_folder_is_no_checkpoint(folder):
    (folder / "checkpoint-000008").mkdir()
    assert latest_valid(folder)[0] == folder / "checkpoint-000006"


def test_where_none_is_whole_all_are_named(folder):
    truncate(folder / "checkpoint-000006" / "unet.safetensors")
    (folder / "checkpoint-000004" / "ema.safetensors").unlink()
    empty(folder / "checkpoint-000002" / "manifest.json")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is valid") as error:
        latest_valid(folder)
    for text in (
        r"checkpoint-000006: unet.safetensors has",
        "checkpoint-000004: ema.safetensors is missing",
        "checkpoint-000002: manifest.json cannot be read",
    ):
        assert text in str(error.value)


def test_damaged_ones_are_kept_and_a_run_does_not_start_anew_beside_them(tmp_path):
    for _ in range(2):
        truncate(write(tmp_path, 6) / "unet.safetensors")
        quarantine(tmp_path / "checkpoint-000006")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000006.broken", "checkpoint-000006.broken2"]
    with pytest.raises(ValueError, match=r"is valid \(checkpoint-000006.broken; checkpoint-000006.broken2\)"):
        latest_valid(tmp_path)


def test_other_names_are_left_alone(folder):
    for name in (
        "checkpoint-final",
        "checkpoint-7",
        "checkpoint-000002.bak",
        "checkpoint-00000６",
        "checkpoint--00001",
    ):
        (folder / name).mkdir()
    (folder / "checkpoint-000099").write_text("notes")
    (folder / "checkpoint-000006" / "notes.txt").write_text("mine")
    assert names(folder) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000006"]
    assert latest_valid(folder) == (folder / "checkpoint-000006", {})
    before = set(os.listdir(folder)) - set(names(folder)) - {"checkpoint-000099"}
    write(folder, 99, limit=1)
    assert (folder / "checkpoint-000099.broken").read_text() == "notes"  # in the way, but not ours
    assert set(os.listdir(folder)) == before | {"checkpoint-000099", "checkpoint-000099.broken"}


# -- writes


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_too(folder, monkeypatch):
    """Files are told by their inodes, which a rename keeps."""
    done, fsync, rename = [], os.fsync, Path.rename

    def note_fsync(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(self, target):
        done.append(target.name if isinstance(target, Path) else target)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    checkpoint = write(folder, 8, limit=3)
    named = done.index("checkpoint-000008")
    assert {path.stat().st_ino for path in (checkpoint, *checkpoint.iterdir())} <= set(done[:named])
    removed = done.index(".checkpoint-000002.partial")
    assert folder.stat().st_ino in done[named:removed]


def test_a_full_disk_at_any_write_leaves_all_as_it_was(written, tmp_path, monkeypatch):
    """Whatever touches the disk fails in its turn."""
    touching = [(checkpoints, "write_tensor_file"), (os, "fsync"), (Path, "write_text"), (Path, "mkdir")]
    touching += [(Path, "rename"), (Path, "replace")]
    for broken in itertools.count():
        folder = shutil.copytree(written, tmp_path / str(broken))
        calls = itertools.count()

        def failing(function, calls=calls, broken=broken):
            def touch(*args, **kwargs):
                if next(calls) == broken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return function(*args, **kwargs)

            return touch

        with monkeypatch.context() as patch:
            for place, name in touching:
                patch.setattr(place, name, failing(getattr(place, name)))
            try:
                write(folder, 8, limit=4)
                break
            except TrainingError as error:
                failed = str(error)
        assert "checkpoint of step 8 could not be written: [Errno 28] No space left" in failed
        assert {"checkpoint-000002", "checkpoint-000004", "checkpoint-000006"} <= set(os.listdir(folder))
        assert set(os.listdir(folder)) == set(names(folder))
        assert all(find_corruption(checkpoint) is None for checkpoint in checkpoints.list_checkpoints(folder))
    assert broken > 15


def test_a_file_that_cannot_be_written_to_its_end(folder):
    """The system itself refuses, in the midst of a file; a full disk cannot be made without privileges."""
    sizes = {(folder / "checkpoint-000006" / name).stat().st_size for name in FILES}
    before, failures = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    limits = sorted({0, 1, *(size - 1 for size in sizes), *sizes})
    for most in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            write(folder, 8, limit=4)
        except TrainingError as error:
            failures += 1
            failed = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if failures:
            assert "File too large" in failed
            assert "last good one is checkpoint-000006" in failed
        assert all(find_corruption(checkpoint) is None for checkpoint in checkpoints.list_checkpoints(folder))
        assert set(os.listdir(folder)) == set(names(folder))
    assert failures == len(limits) - 1
    assert names(folder)[-1] == "checkpoint-000008"


@pytest.mark.parametrize("file", list(TENSORS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_written(folder, file, value):
    name, *_ = TENSORS[file]
    spoiled = TENSORS[file][name].clone()
    spoiled.view(-1)[-1] = value
    with pytest.raises(TrainingError, match=f"step 8, {name} of {file} is not finite"):
        write_checkpoint(folder, 8, {**TENSORS, file: {**TENSORS[file], name: spoiled}}, NUMBERS, 3)
    assert sorted(os.listdir(folder)) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000006"]


def test_what_a_kill_left_behind_is_removed(folder):
    (folder / ".checkpoint-000008.partial" / "inner").mkdir(parents=True)
    remove_partial_checkpoints(folder)
    assert sorted(os.listdir(folder)) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000006"]


def test_a_text_file_is_the_new_one_or_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    files.write_json(file, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        files.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(file, {"a": float("nan")})

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from zsnr_diffusers.training.checkpointing import lock
from zsnr_diffusers.training.checkpointing.lock import LOCK_FILE, lock_run_folder

HOLD = f"""
import sys, os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("lock", {lock.__file__!r})  # alone, since the package takes seconds to import
lock = module_from_spec(spec)
spec.loader.exec_module(lock)
if sys.argv[2] == "without":
    lock.fcntl = None
with lock.lock_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture(params=["system", "without"])
def locks(request, monkeypatch):
    """The system's locks, and none."""
    if request.param == "without":
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


@pytest.fixture
def holder(tmp_path, locks):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), locks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_do_not_hold_one_folder(tmp_path, holder):
    message = rf"{tmp_path} is in use by process {holder.pid} on .* wait for it.*remove"
    with pytest.raises(ValueError, match=message), lock_run_folder(tmp_path):
        raise AssertionError
    holder.communicate("\n")
    assert holder.returncode == 0
    with lock_run_folder(tmp_path):
        pass


def test_a_killed_holder_holds_no_more(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with lock_run_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")


def test_a_child_that_outlives_its_parent_does_not_hold_the_folder(tmp_path):
    """As workers of a data loader do for some seconds after SIGKILL."""
    forks = HOLD.replace("input()", "os.fork() or input(); print('forked', flush=True); os.kill(os.getpid(), 9)")
    process = subprocess.Popen(
        [sys.executable, "-c", forks, str(tmp_path), "system"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    assert process.stdout.readline() == "forked\n"
    assert process.wait() == -9
    with lock_run_folder(tmp_path):
        pass
    process.stdin.close()
    process.stdout.close()


def test_nothing_is_left(tmp_path, locks):
    for name, left in (("empty", False), ("full", True)):
        folder = tmp_path / "new" / name
        with lock_run_folder(folder):
            assert (folder / LOCK_FILE).exists()
            if left:
                (folder / "result").write_text("")
        assert folder.exists() == left
        assert not (folder / LOCK_FILE).exists()
    with lock_run_folder(tmp_path / "new"):  # which was there
        pass
    assert os.listdir(tmp_path / "new") == ["full"]


def test_let_go_after_an_error(tmp_path, locks):
    with pytest.raises(KeyError), lock_run_folder(tmp_path):
        raise KeyError
    with lock_run_folder(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with (
        lock_run_folder(tmp_path),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
        lock_run_folder(tmp_path),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == []


def test_a_process_of_another_machine_counts_as_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / LOCK_FILE).write_text("1 on elsewhere")
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"), lock_run_folder(tmp_path):
        raise AssertionError
    (tmp_path / LOCK_FILE).write_text(f"1 on {socket.gethostname()}")  # init, which may not be signalled by all
    with pytest.raises(ValueError, match="in use"), lock_run_folder(tmp_path):
        raise AssertionError


def test_a_holder_that_goes_between_our_two_steps(tmp_path, monkeypatch):
    """Its file, which we hold by then, is not the one that others will find."""
    samestat = os.path.samestat
    answers = iter([False])
    monkeypatch.setattr(os.path, "samestat", lambda a, b: next(answers, samestat(a, b)))
    with lock_run_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("removed", [True, False])
def test_a_lock_file_is_held_only_while_it_is_the_one_at_its_path(tmp_path, removed):
    file = tmp_path / LOCK_FILE
    with file.open("a+") as stream:
        assert lock._is_same_file(stream, file)
        file.unlink()
        if not removed:
            file.write_text("of the next holder")
        assert not lock._is_same_file(stream, file)


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError, None])
def test_a_process_of_this_machine_is_asked_by_the_signal_that_does_nothing(tmp_path, monkeypatch, error):
    """One of another user's refuses even that, and runs."""
    asked = []

    def kill(number, what):
        asked.append((number, what))
        if error:
            raise error

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(os, "kill", kill)
    file = tmp_path / LOCK_FILE
    file.write_text(f"17 on {socket.gethostname()}")
    if error is ProcessLookupError:
        with lock_run_folder(tmp_path):
            assert file.read_text() == f"{os.getpid()} on {socket.gethostname()}"
    else:
        with pytest.raises(ValueError, match="in use by process 17 on"), lock_run_folder(tmp_path):
            raise AssertionError
        assert file.read_text() == f"17 on {socket.gethostname()}"
    assert asked == [(17, 0)]


@pytest.mark.parametrize("text", ["", "nobody", "-1 on elsewhere"])
def test_a_lock_file_without_a_process_holds_nothing(tmp_path, monkeypatch, text):
    """A process that was killed before it wrote leaves an empty one."""
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / LOCK_FILE).write_text(text)
    with lock_run_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(PermissionError, match=rf"--output_dir={tmp_path} cannot be written"),
        lock_run_folder(tmp_path),
    ):
        raise AssertionError

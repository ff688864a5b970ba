"""Lock that allows one run per folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run's output folder; it is created if necessary, and removed if still empty.

    The operating system releases the lock when the process ends. On file systems without locks, the lock file is valid
    while the process that it names is alive.

    Raises:
        ValueError: another process has locked it.
        OSError: the folder cannot be written.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    try:
        release = _acquire_system_lock(file)
    except PermissionError as error:
        raise PermissionError(f"--output_dir={folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        release()
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire_system_lock(file: Path) -> Callable[[], None]:
    """Lock a run's lock file with `fcntl`, or by its existence if that fails; returns a function that releases it."""
    if fcntl is None:
        return _acquire_lock_file(file)
    while True:
        # Not "w": keep what the owner wrote.
        stream = file.open("a+")
        try:
            # Not flock, which data loader workers would inherit and keep after this process ends.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = stream.read()
            stream.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use_error(file, holder) from None
            return _acquire_lock_file(file)
        if _is_same_file(stream, file):
            break
        stream.close()  # the previous owner removed it in between
    stream.truncate(0)
    stream.write(_holder_record())
    stream.flush()

    def release() -> None:
        file.unlink(missing_ok=True)
        stream.close()

    return release


def _acquire_lock_file(file: Path) -> Callable[[], None]:
    """Lock a run's folder by the existence of its lock file; returns a function that releases it."""
    while True:
        try:
            stream = file.open("x")
        except FileExistsError:
            holder = file.read_text()
            if _may_be_running(holder):
                raise _in_use_error(file, holder) from None
            file.unlink(missing_ok=True)
            continue
        with stream:
            stream.write(_holder_record())
        return lambda: file.unlink(missing_ok=True)


def _in_use_error(file: Path, holder: str) -> ValueError:
    """The error for a run's folder that another process has locked."""
    return ValueError(
        f"--output_dir={file.parent} is in use by process {holder or '(unknown)'}: wait for it, or choose another "
        f"folder. If it is no longer running, remove {file}."
    )


def _is_same_file(stream: IO[str], file: Path) -> bool:
    """Whether an open lock file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _holder_record() -> str:
    """Content of a lock file: this process's id and host."""
    return f"{os.getpid()} on {socket.gethostname()}"


def _may_be_running(holder: str) -> bool:
    """Whether the process in a lock file may still run; always true for other hosts and on Windows."""
    number, _, host = holder.partition(" on ")
    if not number.isdecimal():
        return False
    if host != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

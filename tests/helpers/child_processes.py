"""Training runs in processes of their own, which start at once: forked from one that has imported everything."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import psutil

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["zsnr_diffusers.training.run", "child_processes"])  # the package itself is lazy


def start(options, log, environment=None, prepare=None, kind=None):
    """A process that trains as its command line would make it; its output goes to a file.

    Args:
        options: of its configuration.
        log: file of its output.
        environment: variables to set.
        prepare: called in the process first; a function of a module.
        kind: of configuration, if no `TrainingConfig`.
    """
    process = _forked.Process(target=_train, args=(arguments(options), str(log), environment or {}, prepare, kind))
    process.start()
    return process


def arguments(options):
    """A command line."""
    flags = [f"--{name}" for name, value in options.items() if value is True]
    lists = [[f"--{name}", *value] for name, value in options.items() if isinstance(value, list) and value]
    one = {name: value for name, value in options.items() if not isinstance(value, bool | list)}
    return [*(f"--{name}={value}" for name, value in one.items()), *itertools.chain(*lists), *flags]


def start_ranks(options, folder, prepare=None, count=2, environment=None):
    """Processes of one run over gloo, as a launcher would start them; they write `rank0.log`, `rank1.log`, ..."""
    shared = {**(environment or {}), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            options,
            Path(folder, f"rank{rank}.log"),
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            prepare,
        )
        for rank in range(count)
    ]


def free_port():
    """A port that nobody listened at a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _train(argv, log, environment, prepare, kind):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process that a command started
    if prepare is not None:
        prepare()
    from zsnr_diffusers.training import main

    main(argv, **({} if kind is None else {"kind": kind}))


def slow_syncs():
    """Let every fsync take 20 ms more, so that a kill finds a checkpoint half written."""
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(0.02)
        fsync(descriptor)

    os.fsync = slow


def slow_steps():
    """Let every step take 0.2 s more."""
    from zsnr_diffusers.training import trainer

    v_loss = trainer.v_loss

    def slow(*args):
        time.sleep(0.2)
        return v_loss(*args)

    trainer.v_loss = slow


def wait_until(condition, *processes, seconds=120):
    """Wait until a condition holds or all of the processes have ended; whether it holds.

    Raises:
        TimeoutError: neither, for so long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if processes and all(process.exitcode is not None for process in processes):
            return bool(condition())
        time.sleep(0.001)
    raise TimeoutError


def exit_code(process, seconds=120):
    """Of a process that is to end by itself; one that does not is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError
    return process.exitcode


def kill(pid):
    """SIGKILL, to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(pid):
    """Process ids of a process's children."""
    return [child.pid for child in psutil.Process(pid).children()]

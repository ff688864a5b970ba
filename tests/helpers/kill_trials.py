"""A run that is killed many times, and what is on the disk after each time."""

import hashlib
import random
import time
from collections import Counter
from pathlib import Path

from child_processes import exit_code, kill, slow_syncs, start, wait_until
from safetensors.torch import load_file

from zsnr_diffusers.training.checkpointing.checkpoint import (
    NUMBERS,
    checkpoint_step,
    find_corruption,
    list_checkpoints,
)
from zsnr_diffusers.training.pixels import PixelTrainingConfig

AIMS = ("checkpoint", "row group", "checkpoint", "row group", None)
"""What is being written as the process is killed, in turns; None for whatever it is."""

_ROW_GROUPS = "cache/shard_data/*.arrow"
_LONGEST = {"checkpoint": 0.15, "row group": 0.02, None: 4.0}
"""Seconds from the first byte, or from the start, in which a process is killed."""


class KillTrials:
    """Kills of one run of pixels on parquet files, whose checkpoints and row groups are in its own folder.

    Attributes:
        hits: how many kills left something half written, by what it was; one may count for both.
        digests: of every checkpoint that was seen, by step.
        row_groups: bytes of every copy of a row group that was seen, by name.
    """

    def __init__(self, options, log, seed=0):
        self.options, self.log, self.folder = {**options, "resume": True}, log, Path(options["output_dir"])
        self.hits, self.digests, self.row_groups = Counter(), {}, {}
        self._draw = random.Random(seed)

    def kill_once(self, aim):
        """Start or resume the run, kill it, and look at what it left."""
        most = {"checkpoint": 4, "row group": self._forget_row_groups()}
        before = self._partials()
        process = start(self.options, self.log, prepare=slow_syncs, kind=PixelTrainingConfig)
        if aim is not None:
            self._wait_for(aim, before[aim], self._draw.randrange(most[aim]), process)
        time.sleep(self._draw.uniform(0, _LONGEST[aim]))
        kill(process.pid)
        assert exit_code(process) < 0, self.log.read_text()
        after = self._partials()
        self.hits.update(name for name in before if after[name] - before[name])
        self._look()

    def _wait_for(self, aim, before, passed, process):
        """Wait until a process begins to write after it has done so some times, or has done so once more unseen."""
        first = self._written()[aim]

        def begun():
            since = self._written()[aim] - first
            return since > passed or (since == passed and self._partials()[aim] - before)

        assert wait_until(begun, process), self.log.read_text()

    def finish(self, steps):
        """Train so many steps beyond the last checkpoint; the last step."""
        last = newest_step(self.folder) + steps
        process = start({**self.options, "max_train_steps": last}, self.log, kind=PixelTrainingConfig)
        assert exit_code(process) == 0, self.log.read_text()
        self._look()
        assert not self._partials()["checkpoint"]
        return last

    def _partials(self):
        """Identities of what is half written, by what it is."""
        row_groups = self.folder.glob("cache/shard_data/.*.partial")
        return {
            "checkpoint": set(map(identity, half_written(self.folder))),
            "row group": set(map(identity, row_groups)),
        }

    def _written(self):
        """How much is whole, by what it is."""
        return {"checkpoint": newest_step(self.folder), "row group": len([*self.folder.glob(_ROW_GROUPS)])}

    def _forget_row_groups(self):
        """Remove some copies of row groups, so that there are some to write; at least how many."""
        copies = sorted(self.folder.glob(_ROW_GROUPS))
        removed = self._draw.sample(copies, self._draw.randint(min(1, len(copies)), len(copies)))
        for copy in removed:
            copy.unlink()
        return max(1, len(removed))

    def _look(self):
        """Check what is whole by its name: checkpoints by their manifest, and all of it by what was seen before."""
        for checkpoint in list_checkpoints(self.folder):
            assert find_corruption(checkpoint) is None
            digest = checkpoint_digest(checkpoint)
            assert self.digests.setdefault(checkpoint_step(checkpoint), digest) == digest
        for copy in self.folder.glob(_ROW_GROUPS):
            assert self.row_groups.setdefault(copy.name, copy.read_bytes()) == copy.read_bytes()
        assert not list(self.folder.glob("*.broken*"))


def newest_step(folder):
    """Of the checkpoints in a run's folder; 0 if there are none."""
    return max(map(checkpoint_step, list_checkpoints(folder)), default=0)


def half_written(folder):
    """Checkpoints that are being written; what is being removed is no newer than the newest."""
    newest = newest_step(folder)
    partial = folder.glob(".checkpoint-*.partial")
    return [path for path in partial if int(path.name.split("-")[1].split(".")[0]) > newest]


def identity(path):
    """A folder's name and when it was made, since a half-written checkpoint is made again under its name."""
    try:
        return path.name, path.stat().st_ino, path.stat().st_ctime_ns
    except FileNotFoundError:
        return path.name, None, None


def checkpoint_digest(checkpoint):
    """A hash of all numbers of a checkpoint; files may differ in the order of names."""
    digest = hashlib.sha256((checkpoint / NUMBERS).read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()

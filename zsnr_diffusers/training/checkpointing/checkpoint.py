"""Atomic checkpoints.

A checkpoint is a folder with tensors in safetensors, numbers in JSON, and a manifest with size and SHA-256 of each
file. It is written under a temporary name, flushed to disk, and then renamed; nothing in it is pickled. `state`
defines the tensors.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...utils.files import atomic_rmtree, fsync, write_json
from ...utils.hashing import file_sha256
from ..errors import TrainingError
from .tensor_file import FileFacts, write_tensor_file

MANIFEST, NUMBERS = "manifest.json", "numbers.json"
_NAME = re.compile(r"checkpoint-([0-9]{6,})")

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file name, without extension, and tensor name."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders in a run's folder, valid or not, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimizer steps of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_checkpoint(output_dir: Path, step: int, tensors: Tensors, numbers: Mapping[str, Any], limit: int) -> Path:
    """Write a checkpoint, then remove those beyond the limit.

    Args:
        output_dir: folder of the run.
        step: number of optimizer steps.
        tensors: to save, on any device.
        numbers: to save, JSON-serializable.
        limit: number of newest checkpoints to keep.

    Raises:
        TrainingError: a tensor is not finite, or writing failed; existing checkpoints are unchanged.
        OSError: an old one cannot be removed.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    partial = final.with_name(_partial_name(final))
    _check_finite(tensors, step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {}
        for name, values in tensors.items():
            file = f"{name}.safetensors"
            files[file] = write_tensor_file(partial / file, values)
        write_json(partial / NUMBERS, numbers)
        files[NUMBERS] = FileFacts((partial / NUMBERS).stat().st_size, file_sha256(partial / NUMBERS))
        manifest = {name: facts._asdict() for name, facts in sorted(files.items())}
        write_json(partial / MANIFEST, {"step": step, "files": manifest})
        if final.exists():
            quarantine(final)
        partial.rename(final)
        fsync(output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in list_checkpoints(output_dir)[-1:]]
        raise TrainingError(
            f"The checkpoint of step {step} could not be written: {error}. The last good one is "
            f"{kept[0] if kept else 'none'}."
        ) from error
    for old in list_checkpoints(output_dir)[:-limit]:
        atomic_rmtree(old, _partial_name(old))
    return final


def read_checkpoint(checkpoint: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint's tensors, on the CPU, and its numbers."""
    tensors = {file.stem: load_file(file) for file in checkpoint.glob("*.safetensors")}
    return tensors, json.loads((checkpoint / NUMBERS).read_text(encoding="utf-8"))


def latest_valid(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest valid checkpoint, None if there never was one, and the defect of each newer one.

    Raises:
        ValueError: there are or were checkpoints, but none is valid.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        defect = find_corruption(checkpoint)
        if defect is None:
            return checkpoint, damaged
        damaged[checkpoint] = defect
    earlier = sorted(path.name for path in output_dir.glob("checkpoint-*.broken*"))
    if damaged or earlier:
        found = "; ".join([*(f"{path.name}: {defect}" for path, defect in damaged.items()), *earlier])
        raise ValueError(
            f"No checkpoint in {output_dir} is valid ({found}). Restore a good copy, or remove them to start from the "
            "beginning."
        )
    return None, damaged


def find_corruption(checkpoint: Path) -> str | None:
    """The defect of a checkpoint according to its manifest, or None; other files are ignored."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        step, files = manifest["step"], manifest["files"]
        promised = {name: (facts["size"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if step != checkpoint_step(checkpoint):
        return f"{MANIFEST} is of step {step}"
    for name, (size, digest) in promised.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if file_sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def quarantine(checkpoint: Path) -> Path:
    """Rename a corrupt checkpoint, so that its name is available and nothing is lost.

    Returns:
        Its new path.
    """
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.broken{number if number > 1 else ''}")).exists():
        number += 1
    return checkpoint.rename(aside)


def remove_partial_checkpoints(output_dir: Path) -> None:
    """Remove incomplete checkpoints of a killed process."""
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path)


def _partial_name(checkpoint: Path) -> str:
    """Folder name of a checkpoint while it is written or removed."""
    return f".{checkpoint.name}.partial"


def _check_finite(tensors: Tensors, step: int) -> None:
    """Refuse to save tensors that are not finite."""
    for file, values in tensors.items():
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise TrainingError(
                    f"After step {step}, {name} of {file} is not finite, so no checkpoint was written. Lower "
                    "--learning_rate or increase --lr_warmup_steps, then --resume from the last one."
                )

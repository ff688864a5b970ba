"""The folder of a run: checks of its owner and disk space, and the record of the run in it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...hub.lora_files import LORA_FILE
from ...utils.files import write_json, write_text
from ..config import OutputConfig
from .checkpoint import list_checkpoints
from .fingerprint import Fingerprint

CONFIG_FILE, FINGERPRINT_FILE = "training_config.yaml", "fingerprint.json"

RESULTS = ("model_index.json", LORA_FILE)
"""Files that a run writes last, for a pipeline and for a LoRA."""


def check_run_folder(config: OutputConfig, identity: Mapping[str, Any]) -> None:
    """Refuse an output folder that contains another run, or is the folder of the base or the data.

    Args:
        config: with the folder.
        identity: options that cannot change during a run, by name.

    Raises:
        ValueError: it is the folder of the base or the data; it contains a run and `--resume` was not passed, or a run
            with other options.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir={folder} is a file.")
    for option, what in (("pretrained_model_name_or_path", "base model"), ("train_data_dir", "data")):
        other = identity.get(option)
        if other and folder.exists() and folder.resolve() == Path(other).resolve():
            raise ValueError(
                f"--output_dir={folder} is the folder of the {what}, --{option}={other}, which a run would overwrite: "
                "choose another output folder."
            )
    written, finished = folder / CONFIG_FILE, any((folder / name).exists() for name in RESULTS)
    found = list_checkpoints(folder)
    if not (written.exists() or finished or found):
        return
    if not config.resume:
        raise ValueError(
            f"--output_dir={folder} already contains a run: pass --resume to continue it, or another folder."
        )
    if finished and not found:
        raise ValueError(
            f"{folder} contains a finished run without a checkpoint to continue from; choose another folder."
        )
    before = _read_run_record(written)
    changed = [
        f"--{name} was {before[name]!r} and is now {value!r}"
        for name, value in identity.items()
        if name in before and before[name] != value
    ]
    _refuse_changes(config, changed)


def check_fingerprint(config: OutputConfig, now: Fingerprint) -> None:
    """Refuse to resume a run whose data or base model have changed.

    Raises:
        ValueError: they have changed, and `--force` was not passed.
    """
    before = _read_run_record(Path(config.output_dir, FINGERPRINT_FILE))
    changed = [
        f"the {name} was {before[name]} and is now {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    _refuse_changes(config, changed)


def check_disk_space(config: OutputConfig, size: int) -> None:
    """Refuse to start if the disk has no space for the checkpoints to keep and one being written.

    Args:
        config: with the folder and the number of checkpoints.
        size: of a checkpoint in bytes.

    Raises:
        ValueError: with the required and the free space.
    """
    folder, limit = Path(config.output_dir), config.checkpoints_total_limit
    missing = max(1, limit + 1 - len(list_checkpoints(folder)))
    free = shutil.disk_usage(folder).free
    if missing * size > free:
        raise ValueError(
            f"--output_dir={folder} needs {missing * size / 1e9:,.2f} GB, for {missing} more checkpoints of "
            f"{size / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free: free some space, choose another folder, or "
            f"lower --checkpoints_total_limit={limit}."
        )


def read_options(folder: Path) -> dict[str, Any]:
    """Options of the run in a folder, by name, as `write_run_record` wrote them; empty if there is none."""
    return _read_run_record(folder / CONFIG_FILE)


def write_run_record(folder: Path, options: Mapping[str, Any], fingerprint: Fingerprint) -> None:
    """Write a run's options and fingerprint into its folder.

    Args:
        folder: of the run.
        options: of the run, by name.
        fingerprint: of data and base.
    """
    # Resuming from this file must not force by accident.
    write_text(folder / CONFIG_FILE, yaml.safe_dump({**options, "force": False}, sort_keys=False))
    write_json(folder / FINGERPRINT_FILE, fingerprint)


def _refuse_changes(config: OutputConfig, changed: list[str]) -> None:
    """Refuse to resume a run with these changes, unless `--force` is passed."""
    if changed and not config.force:
        raise ValueError(
            f"Cannot resume {config.output_dir} as another run: {'; '.join(changed)}. Choose another --output_dir, or "
            "continue anyway with --force."
        )


def _read_run_record(file: Path) -> dict[str, Any]:
    """Content of a run's YAML or JSON record, empty if there is none."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
        return dict(found)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read; restore a good copy or remove it: {error}") from error

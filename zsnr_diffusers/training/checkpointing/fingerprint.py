"""A fingerprint of data and base, which detects changes under the same name."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...utils.hashing import tensors_sha256
from ..config.data import is_encoded
from ..data.dataset import Rows
from ..data.encoded import EncodedRows
from ..data.shards import ShardDataset
from ..parameters import base_state_dict
from ..task import Task

Fingerprint = Mapping[str, Any]
"""JSON-serializable values, by name."""


def compute_fingerprint(task: Task, usable_rows: Sequence[int]) -> Fingerprint:
    """Hashes of a run's data, base networks and schedule, to detect changes on resume.

    Args:
        task: before training.
        usable_rows: indices of the rows that are used.
    """
    used = usable_rows, task.data.image_column
    facts = (task.schedule if task.betas is None else task.betas).config
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    return {
        "data": {"rows": len(usable_rows), "sha256": _encoded_sha256(task) or _data_sha256(task.rows, *used)},
        "schedule": {name: facts[name] for name in names if facts.get(name) is not None},
        **{
            f"base, {name}": tensors_sha256(base_state_dict(network))
            for name, network in task.initial_networks().items()
        },
    }


def _encoded_sha256(task: Task) -> str:
    """SHA-256 of the table of data that were encoded; empty for other data."""
    folder = task.data.train_data_dir
    return str(EncodedRows.open(Path(str(folder))).facts["rows_sha256"]) if is_encoded(folder) else ""


def _data_sha256(rows: Rows, usable_rows: Sequence[int], image_column: str) -> str:
    """SHA-256 of the images' names and sizes and all other columns of the used rows; no image is read."""
    if isinstance(rows, ShardDataset):
        return rows.shards.sha256
    digest = hashlib.sha256()
    for batch in rows.select(usable_rows).with_format("arrow").iter(batch_size=1000):
        images = batch.column(image_column).combine_chunks()
        for image, path in zip(images.field("bytes"), images.field("path"), strict=True):
            name = path.as_py() or ""
            size = image.as_buffer().size if image.is_valid else Path(name).stat().st_size
            digest.update(f"{Path(name).name} {size}\n".encode())
        others = batch.drop_columns([image_column]).to_pylist()
        digest.update(json.dumps(others, default=str).encode())
    return digest.hexdigest()

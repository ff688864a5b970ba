"""Pipelines into folders and single files, and onto the Hub: with stock classes, and what they say of their model."""

import json
from pathlib import Path
from typing import Any

from ..guidance.record import record_of_pipeline
from ..schedulers.sampling import PathSampler
from ..utils.files import atomic_path
from .claims import scheduler_claim
from .custom_pipeline import bundled_scheduler, write_custom_pipeline
from .files import INDEX
from .flow_models import stock_scheduler_for
from .model_card import pipeline_card
from .single_file import write_single_file
from .upload import create_repo, upload
from .weight_files import restore_text_model_prefix, set_config_dtype_to_float32

_OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".st", ".sft", ".safetensor", ".pkl", ".onnx", ".zip")
"""Endings of files that weights are kept in elsewhere."""


def save_pipeline(
    pipe: Any,
    path: Any,
    *,
    format: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> Path:
    """Save a pipeline for users without this package, and optionally push it to the Hub.

    As a folder, it has stock classes alone: a scheduler of ours is replaced by a stock one of the same model, see
    `stock_scheduler_for`. Guidance rescale and kept low frequencies are recorded in it, a start lies beside
    (`enable_start`), and there is a `pipeline.py` that applies them, and that brings a sampler of ours where it is
    another than DDIM; see `write_custom_pipeline`. As a single file, it has the original names of Stable Diffusion
    1.x, 2.x or XL, the keys `v_pred` and `ztsnr` where the model predicts v and ends in pure noise, and ModelSpec
    metadata; `load_pipeline` finds betas, flow matching and guidance in it too. Weights keep their dtype. What is
    there is whole: it is written under another name first.

    Args:
        pipe: the pipeline.
        path: a folder, or a file whose name ends in `.safetensors`.
        format: `diffusers` or `single_file`; by the name unless given.
        overwrite: replace what is there: a file, or a folder with a pipeline.
        push_to_hub: id of a Hub repo, which is made if need be, and whether it can be written is found out before
            anything else. It gets what is saved, in one commit, and a model card unless it has one. A folder and a
            file of the same model go into one repo by two calls.
        private: whether a new repo is.
        token: in place of the one that is logged in.
        commit_message: in place of one that names what was saved.

    Returns:
        The path.

    Raises:
        OSError: the Hub refuses; if what is saved is on the disk already, it stays, and the message says so.
        FileExistsError: there is something, and `overwrite` was not passed, or it is a folder without a pipeline.
        ValueError: the name does not go with the format, or is that of a different kind of file; what a single file
            or a stock scheduler cannot hold.
        TypeError: guidance rescale or kept low frequencies in a pipeline whose class is not diffusers'.
    """
    path = Path(path)
    by_name = "single_file" if path.suffix == ".safetensors" else "diffusers"
    if format not in (None, by_name):
        raise ValueError(f"format={format!r} does not go with {path}: a name in .safetensors is a single file.")
    check_target(path, overwrite)
    claim = scheduler_claim(getattr(getattr(pipe, "scheduler", None), "config", {}))
    repo = None if push_to_hub is None else create_repo(push_to_hub, private, token)
    with atomic_path(path) as new:
        if by_name == "single_file":
            write_single_file(pipe, new, claim.prediction_type, bool(claim.rescale_betas_zero_snr))
        else:
            _write_folder(pipe, new)
    if repo is not None:
        upload(path, repo, pipeline_card(pipe, path, repo), token, commit_message)
    return path


def check_target(path: Path, overwrite: bool, mark: str = INDEX) -> None:
    """Refuse to overwrite a path without permission, or a folder that is no saved pipeline.

    Args:
        path: folder or file.
        overwrite: whether it was asked for.
        mark: the file by which a folder is known as one of those that are written there.

    Raises:
        FileExistsError, ValueError: as in `save_pipeline`.
    """
    check_file_name(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True, or choose another name.")
    if path.is_dir() and not (path / mark).is_file():
        raise FileExistsError(f"{path} is a folder without a {mark}, and is not replaced.")


def check_file_name(path: Path) -> None:
    """Refuse a folder path whose suffix is that of a weights file.

    Raises:
        ValueError: with the name to use instead.
    """
    if path.suffix.lower() in _OTHER_FILES:
        raise ValueError(
            f"{path} would be a folder by the name of a file, and none in {path.suffix} is written here: name it "
            f"{path.with_suffix('.safetensors').name}."
        )


def _write_folder(pipe: Any, folder: Path) -> None:
    """Write a pipeline as a folder of stock classes, with `pipeline.py` where guidance or sampler need it."""
    scheduler = getattr(pipe, "scheduler", None)
    stock = stock_scheduler_for(pipe) if isinstance(scheduler, PathSampler) else None
    pipe.save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        set_config_dtype_to_float32(config)
    for name, part in pipe.components.items():
        if type(part).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            restore_text_model_prefix(folder / name / "model.safetensors")
    if stock is not None:
        stock.save_pretrained(folder / "scheduler")
        file = folder / "model_index.json"
        index = json.loads(file.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", type(stock).__name__]}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    started = getattr(pipe, "default_start", None) is not None
    if record_of_pipeline(pipe) or started or bundled_scheduler(pipe) is not None:
        write_custom_pipeline(pipe, folder)

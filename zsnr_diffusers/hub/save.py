"""Save pipelines as folders or single files, locally or on the Hub, with diffusers' classes and their schedule
recorded.
"""

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
"""Extensions of weights files in other formats."""


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

    A folder uses only diffusers' classes: our schedulers are replaced by equivalent diffusers schedulers, see
    `stock_scheduler_for`. It records guidance rescale and kept low frequencies, includes a start (`enable_start`), and
    has a `pipeline.py` that applies them and adds our sampler if it is not DDIM; see `write_custom_pipeline`. A single
    file uses the original names of Stable Diffusion 1.x, 2.x or SDXL, the keys `v_pred` and `ztsnr` if the model
    predicts v and its schedule ends in pure noise, and ModelSpec metadata; `load_pipeline` also finds betas, flow
    matching and guidance in it. Weights keep their dtype. Writing is atomic.

    Args:
        pipe: the pipeline.
        path: a folder, or a file whose name ends in `.safetensors`.
        format: `diffusers` or `single_file`; by default determined by the name.
        overwrite: replace an existing file, or a folder with a pipeline.
        push_to_hub: id of a Hub repo, created if necessary. Write access is checked before anything else. Files are
            uploaded in one commit, with a model card unless the repo has one. Two calls can save a folder and a file
            of the same model to one repo.
        private: whether a new repo is private.
        token: instead of the stored login.
        commit_message: instead of the default.

    Returns:
        The path.

    Raises:
        OSError: a Hub error; files that were already saved are kept, and the message says so.
        FileExistsError: the path exists and `overwrite` was not passed, or it is a folder without a pipeline.
        ValueError: the name does not match the format, or has the extension of an unsupported one; something that a
            single file or a diffusers scheduler cannot represent.
        TypeError: guidance rescale or kept low frequencies in a pipeline whose class is not part of diffusers.
    """
    path = Path(path)
    by_name = "single_file" if path.suffix == ".safetensors" else "diffusers"
    if format not in (None, by_name):
        raise ValueError(
            f"format={format!r} does not match {path}: a name that ends in .safetensors means a single file."
        )
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
    """Refuse to overwrite a path without permission, or a folder that is not a saved pipeline.

    Args:
        path: folder or file.
        overwrite: whether overwriting is allowed.
        mark: the file that identifies a folder as a saved one.

    Raises:
        FileExistsError, ValueError: as in `save_pipeline`.
    """
    check_file_name(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} already exists; pass overwrite=True, or choose another name.")
    if path.is_dir() and not (path / mark).is_file():
        raise FileExistsError(f"{path} is a folder without a {mark}, so it is not replaced.")


def check_file_name(path: Path) -> None:
    """Refuse a folder path with the extension of a weights file.

    Raises:
        ValueError: with the name to use instead.
    """
    if path.suffix.lower() in _OTHER_FILES:
        raise ValueError(
            f"{path} has the extension of a file, but {path.suffix} files cannot be written: use "
            f"{path.with_suffix('.safetensors').name}."
        )


def _write_folder(pipe: Any, folder: Path) -> None:
    """Write a pipeline as a folder of diffusers classes, with `pipeline.py` if guidance or sampler need it."""
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

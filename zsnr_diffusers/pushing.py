"""What `save_pipeline` wrote, to the Hub: whether that may be is asked first, and a failure leaves it where it is."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi

from .cards import card_text, schedule_rows, schedule_tags
from .custom_pipeline import sampler_of
from .guidance import stock_class
from .hub_errors import TRANSPORT, hub_reason
from .stock_scheduler import stock_scheduler

CARD = "README.md"

_FAILURES = (*TRANSPORT, ValueError, RuntimeError)
"""What the client raises; an upload's errors come as the cause of a RuntimeError."""


def open_repo(repo_id: str, private: bool | None, token: str | None) -> str:
    """Make a repo if it is not there, and find out whether it can be written.

    Args:
        repo_id: owner/name, or a name of the token's owner.
        private: whether a new one is.
        token: in place of the one that is logged in.

    Returns:
        owner/name.

    Raises:
        OSError: it cannot; the message says why and what to do.
        ValueError: there cannot be a repo of this name.
    """
    if token is None and huggingface_hub.get_token() is None:
        raise OSError(f"{repo_id} cannot be pushed to without a token: log in by `hf auth login`, or pass token=.")
    api = HfApi(token=token)
    try:
        repo: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repo of others is there as well; what comes before an upload is granted to those who may write.
        api.preupload_lfs_files(repo, [CommitOperationAdd(CARD, b"?")])
    except _FAILURES as error:
        raise OSError(f"{repo_id} cannot be made or written at the Hub: {reason(error, repo_id)}.") from error
    return repo


def push(path: Path, repo: str, card: str, token: str | None, commit_message: str | None) -> str:
    """Upload a folder or file in one commit, with a model card unless there is one, here or there.

    Returns:
        the commit's address.

    Raises:
        OSError: it failed.
    """
    api, root = HfApi(token=token), path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    operations = [CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
    try:
        if CARD not in [operation.path_in_repo for operation in operations] and not api.file_exists(repo, CARD):
            operations.append(CommitOperationAdd(CARD, card.encode()))
        message = commit_message or f"{path.name}, saved by zsnr_diffusers"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except _FAILURES as error:
        raise OSError(
            f"{path} is whole, but could not be pushed to {repo}: {reason(error, repo)}. To push it as it is: "
            f"huggingface_hub.HfApi().{_by_hand(path, repo)}"
        ) from error


def _by_hand(path: Path, repo: str) -> str:
    if path.is_dir():
        return f"upload_folder(folder_path={str(path)!r}, repo_id={repo!r})"
    return f"upload_file(path_or_fileobj={str(path)!r}, path_in_repo={path.name!r}, repo_id={repo!r})"


def reason(error: BaseException, repo: str) -> str:
    """Why a repo could not be written, in words."""
    return hub_reason(error, repo) or " ".join(str(error).split()).rstrip(".")


def pipeline_card(pipe: Any, path: Path, repo: str) -> str:
    """The model card of a pipeline: schedule, prediction type, spacing, guidance rescale, and how to load it."""
    stock, phi = stock_class(type(pipe)), getattr(pipe, "default_guidance_rescale", 0.0)
    data = huggingface_hub.ModelCardData(library_name="diffusers", tags=[])
    if stock.__name__ in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        data.pipeline_tag = "text-to-image"
    rows = {"pipeline": f"`{stock.__name__}`"}
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None and "beta_schedule" in scheduler.config:
        rows |= schedule_rows(scheduler, stock_scheduler(scheduler))
        data.tags = schedule_tags(scheduler)
    if phi:
        rows["recommended guidance rescale"] = f"{phi:g}"
    return card_text(data, repo.split("/")[-1], "Saved by zsnr_diffusers.", rows, _usage(pipe, path, repo, phi))


def _usage(pipe: Any, path: Path, repo: str, phi: float) -> str:
    if path.suffix == ".safetensors":
        return f"""```python
from huggingface_hub import hf_hub_download
from zsnr_diffusers import load_pipeline

pipe = load_pipeline(hf_hub_download("{repo}", "{path.name}"))
```

The file says by its keys and its metadata what the model predicts. diffusers' `from_single_file` does not read that.
"""
    code = f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}")
```

With another sampler, keep `prediction_type`, `rescale_betas_zero_snr` and `timestep_spacing` of the scheduler config.
"""
    brought = [*(["the guidance rescale"] if phi else []), *(["its own sampler"] if sampler_of(pipe) else [])]
    if brought:
        code += f"""\
`pipeline.py` here brings {" and ".join(brought)}:
`DiffusionPipeline.from_pretrained("{repo}", custom_pipeline="{repo}", trust_remote_code=True)`.
"""
    return code

"""Push a run's result to the Hub: problems are detected before the first step, and a failure keeps the result."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ...hub import upload as hub_upload
from ..checkpointing.run_folder import CONFIG_FILE, FINGERPRINT_FILE
from ..config import OutputConfig
from ..errors import TrainingError
from .validation import first_and_last_preview

_RUN_FILES = ("checkpoint-*", "logs/*", CONFIG_FILE, FINGERPRINT_FILE, ".*")
"""Files of its folder that are not uploaded: the configuration contains local paths, hidden files are the lock and
partial files.
"""


def hub_repo_name(config: OutputConfig) -> str:
    """Name of the repo that a run is pushed to: `--hub_model_id`, or the run folder's name.

    Raises:
        ValueError: there cannot be such a repo, or there is no token.
    """
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--hub_model_id={name!r} is not a valid repo name: {error}") from error
    if huggingface_hub.get_token() is None:
        raise ValueError("--push_to_hub needs a token with write access: run `hf auth login`, or set HF_TOKEN.")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub does not work with HF_HUB_OFFLINE=1: unset it, or push manually afterwards.")
    return name


def create_run_repo(config: OutputConfig) -> str:
    """Create the Hub repo of a run unless it exists, and check that it can be written.

    Returns:
        its id, owner/name.

    Raises:
        ValueError: it cannot; the message has the answer of the Hub.
    """
    try:
        return hub_upload.create_repo(hub_repo_name(config), config.hub_private_repo or None, None)
    except OSError as error:
        raise ValueError(
            f"--push_to_hub: {error} Check the token with `hf auth whoami`, or choose a writable repo with "
            "--hub_model_id."
        ) from error


def upload_run(config: OutputConfig, repo: str, steps: int) -> str:
    """Upload a run's result to the Hub, in one commit.

    Returns:
        the address of the repo.

    Raises:
        TrainingError: it failed; the message says how to do it by hand.
    """
    folder, ignored = Path(config.output_dir), _ignore_patterns(config)
    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(ignored),  # it adds its own to them
            commit_message=f"{steps:,} steps of zsnr_diffusers",
        )
    except Exception as error:  # whatever it is, the result is on the disk
        reason = hub_upload.upload_error_reason(error, repo)
        raise TrainingError(
            f"The pipeline is saved in {folder}, but could not be pushed: {reason}. The same command with --resume "
            "pushes it without further training. Manually: python -c 'import huggingface_hub; "
            f'huggingface_hub.HfApi().upload_folder(repo_id="{repo}", folder_path="{folder}", '
            f"ignore_patterns={json.dumps(ignored)})'"
        ) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def _ignore_patterns(config: OutputConfig) -> list[str]:
    """Patterns of files in a run's folder that are not uploaded: its own, caches, and previews that no card shows."""
    folder, shown = Path(config.output_dir), first_and_last_preview(Path(config.output_dir))
    previews = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("previews/*")) if path not in shown]
    patterns = [*_RUN_FILES, *previews]
    if config.cache_folder.resolve().is_relative_to(folder.resolve()):
        patterns.append(f"{config.cache_folder.resolve().relative_to(folder.resolve()).as_posix()}/*")
    return patterns

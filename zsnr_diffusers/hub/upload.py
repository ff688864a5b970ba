"""Upload saved files to the Hub: permission is checked first, and a failure keeps the local files."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi

from .errors import TRANSPORT, explain_hub_error

CARD = "README.md"

_FAILURES = (*TRANSPORT, ValueError, RuntimeError)
"""Exceptions of the client; an upload raises them as the cause of a RuntimeError."""


def create_repo(repo_id: str, private: bool | None, token: str | None) -> str:
    """Create a Hub repo unless it exists, and check that it can be written.

    Args:
        repo_id: owner/name, or a name of the token's owner.
        private: whether a new repo is private.
        token: instead of the stored login.

    Returns:
        owner/name.

    Raises:
        OSError: no write access; the message gives the cause and the remedy.
        ValueError: an invalid repo name.
    """
    if token is None and huggingface_hub.get_token() is None:
        raise OSError(
            f"{repo_id} cannot be pushed to without a token: log in with `hf auth login`, set HF_TOKEN, or pass "
            "token=."
        )
    api = HfApi(token=token)
    try:
        repo: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repo of others exists too, so request the permissions that precede an upload.
        api.preupload_lfs_files(repo, [CommitOperationAdd(CARD, b"?")])
    except _FAILURES as error:
        raise OSError(
            f"{repo_id} cannot be created or written on the Hub: {upload_error_reason(error, repo_id)}."
        ) from error
    return repo


def upload(
    path: Path,
    repo: str,
    card: str,
    token: str | None,
    commit_message: str | None,
    files: Sequence[Path] | None = None,
) -> str:
    """Upload a folder or file in one commit, with a model card unless the folder or repo has one.

    Args:
        path: the folder or file.
        repo: owner/name.
        card: the model card.
        token: instead of the stored login.
        commit_message: instead of the default.
        files: only these files of the folder, and its model card; None for all.

    Returns:
        The commit's URL.

    Raises:
        OSError: the upload failed.
    """
    api, root = HfApi(token=token), path if path.is_dir() else path.parent
    if path.is_dir():
        files = [path / CARD, *files] if files else sorted(path.rglob("*"))
    names = [file.relative_to(root).as_posix() for file in files or [path] if file.is_file()]
    operations = [CommitOperationAdd(name, root / name) for name in names]
    try:
        if CARD not in names and not api.file_exists(repo, CARD):
            operations.append(CommitOperationAdd(CARD, card.encode()))
        message = commit_message or f"{path.name}, saved by zsnr_diffusers"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except _FAILURES as error:
        raise OSError(
            f"{path} was saved, but could not be pushed to {repo}: {upload_error_reason(error, repo)}. To push it: "
            f"huggingface_hub.HfApi().{_manual_command(path, repo, names)}"
        ) from error


def _manual_command(path: Path, repo: str, names: Sequence[str]) -> str:
    """The `HfApi` call that repeats a failed upload, as Python source."""
    if not path.is_dir():
        return f"upload_file(path_or_fileobj={str(path)!r}, path_in_repo={path.name!r}, repo_id={repo!r})"
    some = "" if len(names) == sum(file.is_file() for file in path.rglob("*")) else f", allow_patterns={names!r}"
    return f"upload_folder(folder_path={str(path)!r}, repo_id={repo!r}{some})"


def upload_error_reason(error: BaseException, repo: str) -> str:
    """Why writing a Hub repo failed, in words."""
    return explain_hub_error(error, repo) or " ".join(str(error).split()).rstrip(".")

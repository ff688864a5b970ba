"""What was saved, to the Hub: whether that may be is asked first, and a failure leaves it where it is."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi

from .errors import TRANSPORT, explain_hub_error

CARD = "README.md"

_FAILURES = (*TRANSPORT, ValueError, RuntimeError)
"""What the client raises; an upload's errors come as the cause of a RuntimeError."""


def create_repo(repo_id: str, private: bool | None, token: str | None) -> str:
    """Create a Hub repo unless it exists, and check that it can be written.

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
        raise OSError(
            f"{repo_id} cannot be pushed to without a token: log in by `hf auth login` or set HF_TOKEN, "
            "or pass token=."
        )
    api = HfApi(token=token)
    try:
        repo: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repo of others is there as well; what comes before an upload is granted to those who may write.
        api.preupload_lfs_files(repo, [CommitOperationAdd(CARD, b"?")])
    except _FAILURES as error:
        raise OSError(
            f"{repo_id} cannot be made or written at the Hub: {upload_error_reason(error, repo_id)}."
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
    """Upload a folder or file in one commit, with a model card unless there is one, here or there.

    Args:
        path: the folder or file.
        repo: owner/name.
        card: the model card.
        token: in place of the one that is logged in.
        commit_message: in place of one that names what was saved.
        files: of the folder, where not all of them; its own card goes with them.

    Returns:
        the commit's address.

    Raises:
        OSError: it failed.
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
            f"{path} is whole, but could not be pushed to {repo}: {upload_error_reason(error, repo)}. To push it as "
            f"it is: huggingface_hub.HfApi().{_manual_command(path, repo, names)}"
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

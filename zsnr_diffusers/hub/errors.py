"""Hub errors as one sentence with the cause and the remedy.

The Hub client raises many kinds of errors, and diffusers wraps them in others, some of which give a wrong reason.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .known_models import find_repo_copy

TRANSPORT: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
"""Errors of the client's HTTP library, which differs between its major versions."""

_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


@contextlib.contextmanager
def explain_hub_errors(source: Any) -> Iterator[None]:
    """Explain errors that occur while a Hub repo is read; errors about local paths pass unchanged.

    Raises:
        OSError: with the repo's id, the cause and the remedy.
        ValueError: any other error, with the repo's id.
    """
    try:
        yield
    except (*TRANSPORT, ValueError) as error:
        if Path(os.fspath(source)).exists():
            raise
        reason = explain_hub_error(error, str(source))
        if reason is None:
            raise ValueError(f"{source}: {_one_line(error)}.") from error
        raise OSError(f"{source} is not a local folder or file, and cannot be read from the Hub: {reason}.") from error


def explain_hub_error(error: BaseException, repo: str) -> str | None:
    """The cause of an error of the Hub client, or of a diffusers error that wraps one, in words; None for other
    errors.

    Args:
        error: the caught exception.
        repo: id of the repo.
    """
    chain = [*_exception_chain(error)]
    for kind, reason in (
        (GatedRepoError, f"it is gated: request access at https://huggingface.co/{repo}, then {_LOG_IN}"),
        (RepositoryNotFoundError, _missing_repo_reason(repo)),
        (RevisionNotFoundError, "it has no such revision: check the branch, tag or commit"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and the requested file is not in the cache"),
        (HFValidationError, "this is not a valid repo id, which has the form owner/name"),
    ):
        if any(isinstance(one, kind) for one in chain):
            return reason
    for one in chain:
        if isinstance(one, EntryNotFoundError) and not isinstance(one, LocalEntryNotFoundError):
            return f"it has no file {_requested_file(one) or 'of that name'}"
        if hasattr(getattr(one, "response", None), "status_code"):
            return _http_status_reason(one)
    failed = [one for one in chain if _is_transport_error(one) or isinstance(one, LocalEntryNotFoundError)]
    if failed:
        cause = next(filter(_is_transport_error, failed), failed[0])
        reason = f"the connection failed{_over_requested_file(cause)} ({_one_line(cause)})"
        return f"{reason}; retry: completed downloads are kept"
    return _one_line(error) if isinstance(error, OSError) else None


def _missing_repo_reason(repo: str) -> str:
    """Why a repo was not found: it was removed from the Hub, is private, or does not exist."""
    if copy := find_repo_copy(repo):
        return f"it was removed from the Hub; {copy} is a copy"
    return f"the repo does not exist or is private: check the id, or {_LOG_IN}"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, followed by its chain of causes and contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transport_error(error: BaseException) -> bool:
    """Whether an exception comes from the HTTP library of the Hub client."""
    libraries = {kind.__module__.split(".")[0] for kind in TRANSPORT} - {"builtins"}
    return type(error).__module__.split(".")[0] in libraries


def _http_status_reason(error: Any) -> str:
    """The Hub's HTTP error status in words, with the remedy."""
    status = error.response.status_code
    over = _over_requested_file(error)
    if status == 401:
        return f"it answers 401, not authorized{over}: {_LOG_IN}"
    if status == 403:
        return f"it answers 403, forbidden{over}: your token lacks this permission; {_LOG_IN} with one that has it"
    later = "; try again later" if status >= 500 or status == 429 else ""
    return f"it answers {status}{over}{later}"


def _over_requested_file(error: Any) -> str:
    """ " over NAME" for the file that a failed Hub request was for, empty if unknown."""
    name = _requested_file(error)
    return f" over {name}" if name else ""


def _requested_file(error: Any) -> str | None:
    """Name of the file that a failed Hub request was for; None if unknown."""
    for holder in ("response", "request"):
        with contextlib.suppress(RuntimeError):  # a request that the library did not record
            url = str(getattr(getattr(error, holder, None), "url", ""))
            if "/resolve/" in url:
                return url.split("/resolve/", 1)[1].split("/", 1)[1]
    return None


def _one_line(error: BaseException) -> str:
    """An exception's message on one line, without a final period."""
    return " ".join(str(error).split()).rstrip(".")

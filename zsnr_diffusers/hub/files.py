"""The JSON files of a saved pipeline, in a local folder or on the Hub; error messages name the file."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .errors import explain_hub_errors
from .weight_files import weight_variants

INDEX, SCHEDULER_CONFIG = "model_index.json", "scheduler_config.json"

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Arguments of `from_pretrained` that say where to look on the Hub."""


def hub_kwargs_of(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to look on the Hub, and those in `more`."""
    return {key: kwargs[key] for key in (*HUB_KWARGS, *more) if key in kwargs}


def load_json(source: Any, name: str, places: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a JSON file of a folder or Hub repo; None if there is none of this name.

    Args:
        source: folder or Hub id.
        name: with the subfolder.
        places: arguments of `from_pretrained`; only `HUB_KWARGS` are used.

    Raises:
        OSError: the repo does not exist or cannot be read.
        ValueError: the file is not a JSON object.
    """
    folder = Path(os.fspath(source))
    if folder.is_dir():
        return read_json(folder / name) if (folder / name).exists() else None
    with explain_hub_errors(source):
        try:
            path = hf_hub_download(str(source), name, **hub_kwargs_of(places))
        except LocalEntryNotFoundError:
            if _is_cached_as_missing(str(source), name, places):
                return None
            raise
        except EntryNotFoundError:
            return None
    return read_json(Path(path))


def _is_cached_as_missing(repo: str, name: str, places: Mapping[str, Any]) -> bool:
    """Whether the Hub's cache records that a repo has no file of this name."""
    where = {key: places[key] for key in ("cache_dir", "revision") if key in places}
    return try_to_load_from_cache(repo, name, **where) is _CACHED_NO_EXIST


def find_only_variant(source: Any, places: Mapping[str, Any]) -> str | None:
    """The variant, such as `fp16`, if a folder or repo has weights only in this variant.

    diffusers does not find them unless the variant is requested by name.

    Args:
        source: folder, or Hub id of a repo that is partly cached.
        places: arguments of `from_pretrained`; only `HUB_KWARGS` are used.

    Returns:
        None if there are weights without a variant, in several variants, or no weights at all.

    Raises:
        OSError: the repo cannot be read.
    """
    folder, here = Path(os.fspath(source)), Path(os.fspath(source)).is_dir()
    if not here:
        where = {key: places[key] for key in ("cache_dir", "revision") if key in places}
        cached = try_to_load_from_cache(str(source), INDEX, **where)
        if not isinstance(cached, str):
            return None  # reading just failed; do not wait for it again
        folder = Path(cached).parent
    names = [file.name for file in folder.glob("unet/*")]
    if not weight_variants(names) and not here:
        with explain_hub_errors(source):
            info = HfApi(token=places.get("token")).model_info(str(source), revision=places.get("revision"))
        names = [file.rfilename for file in info.siblings or () if file.rfilename.startswith("unet/")]
    found = weight_variants(names)
    return found.pop() if len(found) == 1 else None


@contextlib.contextmanager
def error_context(source: Any) -> Iterator[None]:
    """Prefix a ValueError with the name of the source of the value.

    Raises:
        ValueError: with the name.
    """
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a local JSON file that holds an object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object.
    """
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(text: bytes | str, name: str) -> dict[str, Any]:
    """Parse a JSON text that holds an object.

    Args:
        text: content of the file.
        name: of the source, for error messages.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, but must hold an object with settings.")
    return content

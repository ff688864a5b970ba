"""The JSON files of a saved pipeline, in a local folder or at the Hub; whatever they hold, errors name them."""

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
"""Arguments of `from_pretrained` that say where to look."""


def hub_kwargs_of(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where to look at the Hub, and those in `more`."""
    return {key: kwargs[key] for key in (*HUB_KWARGS, *more) if key in kwargs}


def load_json(source: Any, name: str, places: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a JSON file of a folder or Hub repo; None if there is none of this name.

    Args:
        source: folder or Hub id.
        name: with the subfolder.
        places: arguments of `from_pretrained`; those that say where to look are used.

    Raises:
        OSError: there is no such repo, or it cannot be read.
        ValueError: the file holds something else.
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
    """The variant, such as `fp16`, if a folder or repo has weights in that one alone.

    diffusers finds none of them unless it is asked for by name.

    Args:
        source: folder, or Hub id of a repo of which something is in the cache.
        places: arguments of `from_pretrained`; those that say where to look are used.

    Returns:
        None where there are weights without a variant, in several, or none at all.

    Raises:
        OSError: the repo cannot be read.
    """
    folder, here = Path(os.fspath(source)), Path(os.fspath(source)).is_dir()
    if not here:
        where = {key: places[key] for key in ("cache_dir", "revision") if key in places}
        cached = try_to_load_from_cache(str(source), INDEX, **where)
        if not isinstance(cached, str):
            return None  # it could not be read just now, and is not waited for again
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
    """Put the name of what holds a value into the ValueError that refuses it.

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
        ValueError: it holds something else.
    """
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(text: bytes | str, name: str) -> dict[str, Any]:
    """Parse a JSON text that holds an object.

    Args:
        text: of the file, or of another thing.
        name: of that thing, for errors.

    Raises:
        ValueError: no JSON, or no object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not the settings that it should.")
    return content

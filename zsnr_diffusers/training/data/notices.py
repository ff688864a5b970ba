"""Notices about the data before a run starts: number and some names of skipped items."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from ...utils.distributed import is_main_process
from ..config import DataConfig

_MOST_NAMED = 20


def notify(text: str) -> None:
    """Print a notice about the data once for all processes, above progress bars."""
    if is_main_process():
        tqdm.write(text)


def report_unusable(bad: Sequence[str], what: str, config: DataConfig) -> None:
    """Report unusable data, as an error or a notice according to `--on_bad_image`.

    Raises:
        ValueError: there is unusable data, and `--on_bad_image` is `fail`.
    """
    if not bad:
        return
    more = [f"and {len(bad) - _MOST_NAMED} more"] if len(bad) > _MOST_NAMED else []
    text = f"{what}:\n  " + "\n  ".join([*bad[:_MOST_NAMED], *more])
    if config.on_bad_image == "fail":
        raise ValueError(f"{text}\nFix or remove them, or skip them with --on_bad_image skip.")
    notify(text)

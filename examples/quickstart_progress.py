"""A program of several parts that shows one line of progress, and goes on where it was when it is run again."""

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import diffusers
import transformers
from tqdm import tqdm

from zsnr_diffusers.utils.files import write_json
from zsnr_diffusers.utils.quiet import quietly

WIDTH = 79

Advance = Callable[[float], None]
"""Called with the fraction of a part that is done, 0 to 1."""


@dataclass
class Part:
    """Something that takes seconds or minutes, and leaves its result in files."""

    name: str
    seconds: float
    """That it is expected to take. Only the ratios of the parts matter."""
    run: Callable[[Advance], object]
    result: Path
    """A file or folder that is there when it is finished; deleted, it is made again."""


def quieten_libraries() -> None:
    """Leave the terminal to our own progress bars."""
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()


def run_parts(parts: Sequence[Part], record: Path, settings: Mapping[str, Any]) -> None:
    """Run those parts that have not been run yet, under one line of progress.

    Args:
        parts: in order; each may use the files of those before it.
        record: JSON file of the settings, and of the parts that are finished with the seconds that they took.
        settings: on which the results depend.

    Raises:
        SystemExit: the record is of other settings.
    """
    finished = finished_parts(record, settings)
    left = [part for part in parts if part.name not in finished or not part.result.exists()]
    if not left:
        return
    with one_line(left) as advance_by, quietly(), open_log(record.with_suffix(".log")) as log:
        for part in left:
            started = time.perf_counter()
            with advance_by(part) as advance, contextlib.redirect_stdout(log):
                part.run(advance)
            finished[part.name] = round(time.perf_counter() - started, 1)
            write_json(record, {"settings": dict(settings), "seconds": finished})


def finished_parts(record: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the parts that were finished with these settings, by name.

    Raises:
        SystemExit: they were finished with others.
    """
    if not record.exists():
        return {}
    found = json.loads(record.read_text(encoding="utf-8"))
    before = found["settings"]
    if changed := [
        f"{key} {before.get(key)}, not {settings[key]}" for key in settings if before.get(key) != settings[key]
    ]:
        raise SystemExit(
            f"{record.parent} was made with {', '.join(changed)}: pass another --output_dir, or delete it."
        )
    return dict(found["seconds"])


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[io.TextIOBase]:
    """Where what the parts print goes, with that of earlier runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        yield log


@contextlib.contextmanager
def one_line(parts: Sequence[Part]) -> Iterator[Callable[[Part], contextlib.AbstractContextManager[Advance]]]:
    """The line: which part is running, how much of all is done, how much time is left.

    Where standard error is no terminal, a line is printed for each part as it begins.
    """
    total, done = sum(part.seconds for part in parts), 0.0
    width = max(len(part.name) for part in parts)
    line = f"{{desc:{width}}} {{percentage:3.0f}} % |{{bar}}| {{elapsed}}, {{remaining}} left"
    columns = min(WIDTH, shutil.get_terminal_size().columns - 1)
    terminal = sys.stderr.isatty()
    with tqdm(total=total, bar_format=line, ncols=columns, smoothing=0, disable=not terminal) as bar:

        @contextlib.contextmanager
        def advance_by(part: Part) -> Iterator[Advance]:
            nonlocal done
            bar.set_description_str(part.name)
            if not terminal:
                print(f"{done / total:4.0%}  {part.name}", file=sys.stderr, flush=True)
            yield lambda fraction: bar.update(done + part.seconds * min(fraction, 1) - bar.n)
            done += part.seconds
            bar.update(done - bar.n)

        yield advance_by

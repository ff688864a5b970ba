"""What `import zsnr_diffusers` and its schedulers cost on top of diffusers, and how soon the commands answer.

    python examples/benchmarks/import_time.py

Runs each in fresh processes, in turn, so that a drift of the machine's speed meets all alike. The base is diffusers
with its scheduler base class, which any scheduler class must import; ratios are of pairs. Commands are those that are
answered before torch is imported.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

BASE = "import diffusers; from diffusers.schedulers.scheduling_utils import SchedulerMixin"
OURS = f"{BASE}; from zsnr_diffusers import ZeroSNRMultistepScheduler"
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
COMMANDS = ("--version", "--help", "train --help", "evaluate --help", "adit", "audit model --plto x")


def seconds(code: str) -> float:
    """Wall time of the imports in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def answer_seconds(line: str) -> float:
    """Wall time of a whole process of `zsnr`, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "zsnr_diffusers", *line.split()], capture_output=True)
    return time.perf_counter() - start


def interleaved(count: int, *measured: Callable[[], float]) -> list[list[float]]:
    """`count` measurements of each, in turn."""
    rounds = [[one() for one in measured] for _ in range(count)]
    return [list(values) for values in zip(*rounds, strict=True)]


def main() -> None:
    """Print seconds and ratio, and the seconds of commands."""
    parser = argparse.ArgumentParser(description="Time to import zsnr_diffusers, and to the answers of its commands.")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of processes (default: 15)")
    parser.add_argument("--answers", type=int, default=10, help="runs of each command (default: 10)")
    arguments = parser.parse_args()
    seconds(OURS)  # fills the file cache
    package = "import zsnr_diffusers"
    timed = [lambda code=code: seconds(code) for code in (BASE, OURS, package)]
    base, ours, alone = interleaved(arguments.pairs, *timed)
    ratios = [b / a for a, b in zip(base, ours, strict=True)]
    print(f"import zsnr_diffusers alone:      {statistics.median(alone):.3f} s")
    print(f"diffusers and its scheduler base: {statistics.median(base):.3f} s")
    print(f"with a scheduler of ours:         {statistics.median(ours):.3f} s")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ratio, median of {arguments.pairs} pairs:       {middle:.3f} ({low:.3f} to {high:.3f})")
    answers = interleaved(arguments.answers, *(lambda line=line: answer_seconds(line) for line in COMMANDS))
    print(f"answers, median of {arguments.answers} (lowest to highest):")
    for line, values in zip(COMMANDS, answers, strict=True):
        print(f"  zsnr {line:22} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()

"""What `import zsnr_diffusers` costs on top of diffusers.

    python examples/benchmarks/import_time.py

Imports each in fresh processes, in turn, so that a drift of the machine's speed meets both alike, and prints the ratio
pair by pair. The base is diffusers with its scheduler base class, which any scheduler class must import.
"""

import argparse
import statistics
import subprocess
import sys

BASE = "import diffusers; from diffusers.schedulers.scheduling_utils import SchedulerMixin"
OURS = f"{BASE}; import zsnr_diffusers"
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """Wall time of the imports in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print seconds and ratio."""
    parser = argparse.ArgumentParser(description="Import time of zsnr_diffusers over that of diffusers.")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of processes (default: 15)")
    pairs = parser.parse_args().pairs
    seconds(OURS)  # fills the file cache
    base, ours = zip(*[(seconds(BASE), seconds(OURS)) for _ in range(pairs)], strict=True)
    ratios = [b / a for a, b in zip(base, ours, strict=True)]
    print(f"diffusers and its scheduler base: {statistics.median(base):.3f} s")
    print(f"with zsnr_diffusers:              {statistics.median(ours):.3f} s")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ratio, median of {pairs} pairs:       {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()

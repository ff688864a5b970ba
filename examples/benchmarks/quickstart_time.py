"""How long the quickstart takes on idle cores, and while another program keeps one of them busy.

    python examples/benchmarks/quickstart_time.py                  # on two cores
    python examples/benchmarks/quickstart_time.py --mode pixels
    OMP_NUM_THREADS=2 python examples/benchmarks/quickstart_time.py --only busy

Each run is a fresh process with a folder of its own, on the first cores that this process may use; the busy core runs
an endless loop beside it. Where a system cannot pin processes (macOS, Windows), both run anywhere.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"
RECORDS = {"latent": "progress.json", "pixels": "progress-pixels.json"}


def pin(cores: int) -> None:
    """Keep this process and its children to so many of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


@contextlib.contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """A process that never pauses, on the first core."""
    pinned = "if hasattr(os, 'sched_setaffinity'):\n    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    with subprocess.Popen([sys.executable, "-c", f"import os\n{pinned}while True:\n    pass"]) as loop:
        try:
            yield loop
        finally:
            loop.kill()


def run_quickstart(mode: str) -> tuple[float, dict[str, float]]:
    """Seconds of a whole run in a fresh folder, from the start of the process to its end, and of each of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, str(QUICKSTART), "--mode", mode, "--output_dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return seconds, json.loads(Path(folder, RECORDS[mode]).read_text(encoding="utf-8"))["seconds"]


def main() -> None:
    """Print the seconds of each part and of the whole, idle and busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="that the quickstart may use (default: 2)")
    parser.add_argument("--mode", choices=[*RECORDS], default="latent", help="default: latent")
    parser.add_argument("--only", choices=["idle", "busy"], help="one of the two runs")
    arguments = parser.parse_args()
    pin(arguments.cores)
    wholes, parts = {}, {}
    for how in [arguments.only] if arguments.only else ["idle", "busy"]:
        with busy_core() if how == "busy" else contextlib.nullcontext():
            wholes[how], parts[how] = run_quickstart(arguments.mode)
    print(f"\nseconds on {arguments.cores} cores{'':16}" + "".join(f"{how:>8}" for how in wholes))
    for name in next(iter(parts.values())):
        print(f"{name:36}" + "".join(f"{some[name]:8.1f}" for some in parts.values()))
    print(f"{'the whole process':36}" + "".join(f"{seconds:8.1f}" for seconds in wholes.values()))


if __name__ == "__main__":
    main()

"""Does training work on this GPU, and how fast? One command, some eight minutes, no network, no data.

    python examples/benchmarks/gpu_acceptance.py --out acceptance.json
    python examples/benchmarks/gpu_acceptance.py --sections waits "SD 2.1" --out acceptance.json
    python examples/benchmarks/gpu_acceptance.py --rehearse

Whole runs in each precision, with a LoRA and with 8-bit Adam, each with previews and checkpoints and continued from
its middle; caches, compilation, waits for the device; throughput of Stable Diffusion 2.1 at 512 in bf16, with model
FLOPs utilization and memory next to the estimate of --dry_run; a step of SDXL. A section that fails is reported, and
the others go on; one for which the time is too short is left out. --out is written after every section.

Without a GPU nothing is run, and the exit status is 0. --rehearse runs every section on the CPU with tiny networks, so
that no time on a GPU is lost with mistakes in this script; what it prints there is no measurement.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import diffusers
import torch
from acceptance_bench import Bench, NotHereError, Outcome
from acceptance_checks import WAYS as RUNS
from acceptance_checks import caches, compiled, limits, precisions, waits, whole_run
from acceptance_speed import WAYS as SPEEDS
from acceptance_speed import plain, sdxl, speed

import zsnr_diffusers
from zsnr_diffusers.training import speed as training_speed

LEAST, AIM = 110.0, 130.0
"""Images per second of Stable Diffusion 2.1 at 512 that an H100 or H200 is to reach, and those that are aimed at;
NVIDIA's MLPerf entry has 128.6 on an H200."""
SHOWN = ("images_per_s", "mfu", "peak_gb", "estimate_gb", "gpu_busy", "resume_difference", "relative_difference")
"""Figures of the table, if a section has them."""


class Section(NamedTuple):
    """A part of the script, which stands and fails by itself."""

    name: str
    seconds: float
    """That it takes on an H200, about."""
    run: Callable[[Bench, Outcome], None]


SECTIONS = (
    Section("limits", 8, limits),
    Section("waits", 40, waits),
    *(Section(f"run: {way}", 15, whole_run(way)) for way in RUNS),
    Section("precisions", 15, precisions),
    Section("caches", 10, caches),
    Section("SD 2.1", 75, speed("SD 2.1")),
    Section("SD 2.1, blocks compiled", 60, speed("SD 2.1, blocks compiled")),
    Section("SDXL", 30, sdxl),
    Section("SD 2.1 in 24 GB", 30, speed("SD 2.1 in 24 GB")),
    Section("plain loop", 25, plain),
    Section("SD 2.1, uncached", 25, speed("SD 2.1, uncached")),
    Section("SD 2.1, LoRA", 25, speed("SD 2.1, LoRA")),
    Section("compiled", 40, compiled),
    Section("SD 2.1, network compiled", 150, speed("SD 2.1, network compiled")),
)
"""In the order of what an answer is worth."""


def run_section(section: Section, bench: Bench, left: float) -> dict[str, Any]:
    """What a section found, whatever happens in it."""
    if left < section.seconds and not bench.tiny:
        return {"state": "left out", "why": f"{left:.0f} s are left, it takes some {section.seconds:.0f}"}
    found, started, state, why = Outcome(), time.perf_counter(), "passed", ""
    try:
        section.run(bench, found)
    except NotHereError as error:
        state, why = "left out", str(error)
    except Exception as error:  # the others are still worth their time
        traceback.print_exc()
        state, why = "broke", f"{type(error).__name__}: {error}"[:500]
    if found.failed and state == "passed":
        state, why = "failed", "; ".join(f"expected {text}" for text in found.failed)
    seconds = round(time.perf_counter() - started, 1)
    return {"state": state, **({"why": why} if why else {}), "seconds": seconds, "figures": found.figures}


def run_all(sections: Sequence[Section], bench: Bench, budget: float, out: Path | None) -> dict[str, Any]:
    """Run sections one by one, and write what they found after each."""
    started = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(bench.device), "sections": {}}
    for section in sections:
        result = run_section(section, bench, budget - (time.perf_counter() - started))
        results["sections"][section.name] = result
        print(f"{section.name}: {result['state']}{f' ({why})' if (why := result.get('why')) else ''}", flush=True)
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on, when, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    modules = (torch, diffusers, accelerate, zsnr_diffusers)
    versions = {module.__name__: str(module.__version__) for module in modules}
    return {"device": name, "date": datetime.now(timezone.utc).date().isoformat(), **versions}


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        ", ".join(results["machine"].values()),
        "",
        "| section | result | seconds | figures |",
        "|---|---|---|---|",
    ]
    for name, found in results["sections"].items():
        figures = found.get("figures", {})
        shown = ", ".join(f"{key} {figures[key]}" for key in SHOWN if figures.get(key) is not None)
        lines.append(f"| {name} | {found['state']} | {found.get('seconds', '')} | {shown} |")
    return "\n".join(lines)


def judge_speed(results: Mapping[str, Any]) -> str:
    """The fastest cached run of Stable Diffusion 2.1 next to what an H100 is to reach; empty for other cards."""
    cached = [name for name in SPEEDS if name not in ("SD 2.1, uncached", "SD 2.1, LoRA")]
    speeds = [results["sections"].get(name, {}).get("figures", {}).get("images_per_s", 0.0) for name in cached]
    if not any(card in results["machine"]["device"] for card in ("H100", "H200")) or not any(speeds):
        return ""
    verdict = "reached" if max(speeds) >= LEAST else "missed"
    return f"SD 2.1 at 512: {max(speeds):.1f} images/s; {LEAST:.0f} {verdict}, {AIM:.0f} is the aim"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny networks")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all sections (default: 480)")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images (default: 8)")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bf16 (default: an H100's)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--folder", type=Path, help="for models and runs, 60 GB (default: a temporary one)")
    return parser.parse_args(argv)


def rehearse() -> None:
    """Let accelerate take the CPU, in one thread, and compile as far as the graphs, without minutes of kernels."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    training_speed.BACKEND = "aot_eager"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit status: 1 if a section broke or failed."""
    args = parse_arguments(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "There is no CUDA device here, so nothing was run. --rehearse runs all sections on the CPU, in miniature."
        )
        return 0
    if args.rehearse:
        rehearse()
    device = torch.device("cpu" if args.rehearse else "cuda")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(device, Path(folder), args.rehearse, args.workers, args.peak_tflops)
        chosen = [section for section in SECTIONS if section.name in args.sections]
        results = run_all(chosen, bench, args.budget, args.out)
        bench.forget()
    print(f"\n{table(results)}\n{judge_speed(results)}".rstrip())
    return int(any(found["state"] in ("broke", "failed") for found in results["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())

"""How fast Stable Diffusion trains here: our trainer with and without caches beside a plain loop of stock parts.

    python examples/benchmarks/train_throughput.py --size 0.8M
    python examples/benchmarks/train_throughput.py --size 0.8M --channels_last --compile network
    python examples/benchmarks/train_throughput.py --size 23.6M --threads 2 --images 24 --bf16
    python examples/benchmarks/train_throughput.py --size sd21 --device cuda --mixed_precision bf16 --batch_size 16 \
        --workers 8 --peak_tflops 989

The plain loop does what diffusers' text-to-image example does: it encodes images and captions in every step, with
AdamW, EMAModel and DDPMScheduler at their defaults. All three start from the same random weights and read the same
images. They take turns, so that a drift of the machine's speed meets all alike; printed are medians over the rounds,
and the median of each round's ratio to the plain loop. The shares of a step are measured in further rounds, since a
GPU must be waited for at every part. What an option of the trainer pays is seen by a run with it and one without, in
their ratios to the plain loop, which has none of them; --bf16 adds our trainer with caches in bf16, beside float32.
A cache is filled before the clock starts; how long that takes is printed. Beside each ratio on a CPU is the one that
is aimed at; on two quiet cores the third line above takes some five minutes. On a busy machine the ratio in CPU time
is the better one, which does not count the seconds in which others had the processor.

Model FLOPs utilization (MFU) counts the UNet's forward and backward pass alone, which all three need.
"""

import argparse
import functools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
# transformers and diffusers announce, on import, what they would do with libraries that nobody here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
import diffusers
import numpy as np
import torch
import transformers
from landscapes import make_landscapes
from matplotlib.figure import Figure
from throughput_loops import Stopwatch, our_loop, our_run, plain_loop
from throughput_models import MODELS, gigaflops

PARTS = ("data", "VAE", "text", "forward", "backward", "optimizer", "EMA")
PLAIN, ONLINE, CACHED, HALF = "plain loop", "ours, --cache none", "ours, --cache both", "ours, both, bf16"
BARS = {ONLINE: 1.05, CACHED: 1.6, HALF: 2.4}
"""Times as fast as the plain loop in float32, on a CPU, at 23.6M and 128 pixels, that each is to be."""


class Contestant:
    """A loop with what was measured of it."""

    def __init__(self, name: str, make: Callable[[Stopwatch], Iterator[float]], device: torch.device) -> None:
        self.name, self.watch = name, Stopwatch(device)
        before, started = memory(device), time.perf_counter()
        self.losses = make(self.watch)
        next(self.losses)
        self.setup = time.perf_counter() - started
        self.own_memory = memory(device) - before
        self.step_memory = 0.0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.shares: dict[str, float] = {}

    def round(self, count: int) -> None:
        """Make steps, and note what one took: seconds on the clock, and of all threads of this process."""
        before = time.process_time()
        self.seconds.append(self.steps(count))
        self.cpu_seconds.append((time.process_time() - before) / count)

    def steps(self, count: int) -> float:
        """Seconds per step."""
        device = self.watch.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before, started = memory(device), self.watch.now()
        for _ in range(count):
            next(self.losses)
        seconds = (self.watch.now() - started) / count
        if device.type == "cuda":
            self.step_memory = max(self.step_memory, torch.cuda.max_memory_allocated(device) / 1e9 - before)
        return seconds

    def measure_shares(self, count: int) -> None:
        """Where the time of a step goes."""
        self.watch.on = True
        total = self.steps(count) * count
        self.watch.on = False
        self.shares = {part: self.watch.seconds[part] / total for part in PARTS}
        self.shares["rest"] = 1 - sum(self.shares.values())


def memory(device: torch.device) -> float:
    """GB in use on a GPU; on a CPU the most that the process ever used."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def contest(contestants: Sequence[Contestant], args: argparse.Namespace) -> None:
    """Rounds in which each makes some steps."""
    for one in contestants:
        one.steps(args.steps)  # fills caches
    for _ in range(args.rounds):
        for one in contestants:
            one.round(args.steps)
    for one in contestants:
        one.measure_shares(args.steps * max(1, args.rounds // 4))


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def report(contestants: Sequence[Contestant], flops: dict[str, float], args: argparse.Namespace) -> None:
    """Print all."""
    print(
        f"\n{args.size}, {args.resolution} x {args.resolution}, batch {args.batch_size}, {args.mixed_precision} "
        f"mixed precision on {args.device}, {args.threads} thread(s), {args.workers} workers"
    )
    print("GFLOP per image: " + ", ".join(f"{name} {value:,.4g}" for name, value in flops.items()))
    peak = args.peak_tflops and args.peak_tflops * 1e3 / flops["UNet forward + backward"]
    barred = args.size == "23.6M" and args.device == "cpu" and args.mixed_precision == "no"
    head = f"{'in CPU time':>13}" * (args.device == "cpu") + f"{'aim':>8}" * barred + f"{'MFU':>8}" * bool(peak)
    print(f"\n{'':20}{'images/s':>10}{'of plain':>10}{'set up in':>11}{head}")
    for one in contestants:
        speed = args.batch_size / statistics.median(one.seconds)
        ratio = median_ratio(contestants[0].seconds, one.seconds)
        row = f"{one.name:20}{speed:10.2f}{ratio:9.2f}x{one.setup:9.1f} s"
        if args.device == "cpu":
            row += f"{median_ratio(contestants[0].cpu_seconds, one.cpu_seconds):12.2f}x"
        row += (f"{BARS[one.name]:7.2f}x" if one.name in BARS else " " * 8) if barred else ""
        print(row + (f"{speed / peak:8.1%}" if peak else ""))
    print(f"\n{'share of a step':20}" + "".join(f"{part:>10}" for part in (*PARTS, "rest")))
    for one in contestants:
        print(f"{one.name:20}" + "".join(f"{share:10.1%}" for share in one.shares.values()))
    print()
    if args.device == "cpu":
        print(f"peak memory of the process, all contestants together: {memory(torch.device('cpu')):.2f} GB")
    else:
        for one in contestants:
            print(f"{one.name:20}peak memory {one.own_memory + one.step_memory:.2f} GB")


def plot(contestants: Sequence[Contestant], path: Path) -> None:
    """A bar per contestant, as long as its step, divided into parts."""
    figure = Figure(figsize=(9, 1 + 0.5 * len(contestants)), layout="constrained")
    axes = figure.subplots()
    names = [one.name for one in contestants]
    left = np.zeros(len(names))
    for part in (*PARTS, "rest"):
        width = [1e3 * statistics.median(one.seconds) * max(one.shares[part], 0) for one in contestants]
        axes.barh(names, width, left=left, label=part)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    figure.legend(ncols=len(PARTS) + 1, fontsize="small", frameon=False, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Throughput of training.", epilog=__doc__)
    parser.add_argument("--size", choices=MODELS, default="0.8M", help="of the model (default: 0.8M)")
    parser.add_argument("--resolution", type=int, help="pixels per side (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: 8")
    parser.add_argument("--images", type=int, default=64, help="different images (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: 4)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, of each (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for MFU: 989 for an H100 in bf16")
    parser.add_argument("--without", nargs="+", default=[], choices=[ONLINE, CACHED], help="to save memory")
    parser.add_argument("--bf16", action="store_true", help="also ours with caches in bf16")
    parser.add_argument("--channels_last", action="store_true", help="in ours, as are the next three")
    parser.add_argument("--compile", default="none", choices=["none", "blocks", "network"])
    parser.add_argument("--use_8bit_adam", action="store_true")
    parser.add_argument("--allow_tf32", action="store_true")
    parser.add_argument("--plot", type=Path, help="image of the shares to write")
    args = parser.parse_args(argv)
    args.resolution = args.resolution or MODELS[args.size][0]
    return args


def main(argv: Sequence[str] | None = None) -> list[Contestant]:
    """Build, measure, print."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder, "base"), make_landscapes(Path(folder, "data"), args.images, args.resolution)
        pipe = MODELS[args.size][1]()
        pipe.save_pretrained(base)
        flops = gigaflops(pipe, args.resolution)
        makers: dict[str, Callable[[Stopwatch], Iterator[float]]] = {
            PLAIN: lambda watch: plain_loop(base, data, args, watch),
            ONLINE: lambda watch: our_loop(our_run(base, data, args, "none"), watch, args.allow_tf32),
            CACHED: lambda watch: our_loop(our_run(base, data, args, "both"), watch, args.allow_tf32),
        }
        if args.bf16:
            half = functools.partial(our_run, base, data, args, "both", "bf16")
            makers[HALF] = lambda watch: our_loop(half(), watch, args.allow_tf32)
        contestants = [Contestant(name, make, device) for name, make in makers.items() if name not in args.without]
        contest(contestants, args)
        report(contestants, flops, args)
        if args.plot:
            plot(contestants, args.plot)
        return contestants


if __name__ == "__main__":
    main()

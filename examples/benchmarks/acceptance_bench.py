"""What the sections of `gpu_acceptance.py` share: models on disk, runs on them, clocks, and what a section found."""

import collections
import contextlib
import gc
import io
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from landscapes import make_landscapes
from throughput_loops import new_trainer
from throughput_models import MODELS, gigaflops

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.trainer import Trainer

PROMPT = "a night sky"


class NotHereError(Exception):
    """A section cannot run on this machine."""


def require_bitsandbytes() -> None:
    """Leave out a section if Adam cannot be had in 8 bits."""
    if find_spec("bitsandbytes") is None:
        raise NotHereError("bitsandbytes is not installed")


@dataclass
class Outcome:
    """What a section found, filled as it goes, so that an error on the way loses nothing."""

    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    """Expectations that did not hold, in words."""

    def expect(self, holds: bool, text: str) -> None:
        """Note an expectation if it does not hold."""
        if not holds:
            self.failed.append(text)


@dataclass(frozen=True)
class Base:
    """A pipeline of random weights, and images with captions for it."""

    folder: Path
    images: Path
    resolution: int
    gigaflops: float
    """Of the UNet's forward and backward pass, per image."""


class Bench:
    """A device, and a folder with all that is made for it.

    Args:
        device: to run on.
        folder: for models, caches and runs.
        tiny: take networks of some thousand weights for all of them.
        workers: of each loader.
        peak_tflops: of the device, for the model FLOPs utilization.
    """

    def __init__(self, device: torch.device, folder: Path, tiny: bool, workers: int, peak_tflops: float) -> None:
        self.device, self.folder, self.tiny = device, folder, tiny
        self.workers, self.peak_tflops = workers, peak_tflops
        self.small, self.real = ("tiny", "tiny") if tiny else ("0.8M", "sd21")
        self._numbers = itertools.count()

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU of torch's CUDA."""
        return self.device.type == "cuda"

    def base(self, size: str) -> Base:
        """A model of a size, made at the first call."""
        folder, (resolution, build) = self.folder / size, MODELS[size]
        facts = folder / "facts.json"
        if not facts.exists():
            # Only weights of billions are worth the GPU's generator.
            with self.device if size == "sd21" else contextlib.nullcontext():
                pipe = build()
            pipe.save_pretrained(folder / "base")
            make_landscapes(folder / "images", 32, resolution)
            facts.write_text(json.dumps(gigaflops(pipe, resolution)["UNet forward + backward"]))
        return Base(folder / "base", folder / "images", resolution, json.loads(facts.read_text()))

    def config(self, size: str, **options: Any) -> TrainingConfig:
        """The configuration of a run in a new folder; caches are shared."""
        base = self.base(size)
        batch = {"train_batch_size": 2, "gradient_accumulation_steps": 1} if self.tiny else {}
        given = {"mixed_precision": "bf16", "compile": "none", "dataloader_num_workers": 0, **options, **batch}
        return TrainingConfig(
            pretrained_model_name_or_path=str(base.folder),
            train_data_dir=str(base.images),
            resolution=base.resolution,
            output_dir=str(self.folder / f"run-{next(self._numbers)}"),
            cache_dir=str(self.folder / f"cache-{size}"),
            report_to="none",
            **given,
        )

    def trainer(self, config: TrainingConfig) -> Trainer:
        """The trainer of a configuration, and nothing left of the one before."""
        self.forget()
        return new_trainer(config, on_cpu=not self.is_cuda)

    def train(self, config: TrainingConfig) -> None:
        """A whole run, without its words."""
        self.forget()
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)

    def forget(self) -> None:
        """Free what an earlier section left: accelerate's state, the compiler's, blocks of the allocator."""
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.compiler.reset()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, work: Callable[[], Any], count: int = 1) -> float:
        """Seconds per call, with the device waited for before and after."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            work()
        self.synchronize()
        return (time.perf_counter() - started) / count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def peak_gigabytes(self) -> float | None:
        """The most that was allocated on the GPU since `forget`, 1e9 bytes; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.is_cuda else None

    @contextlib.contextmanager
    def counting_waits(self) -> Iterator[collections.Counter[str]]:
        """Count by line of Python, inside, what makes the host wait for the GPU; on a CPU nothing does."""
        waits: collections.Counter[str] = collections.Counter()
        if not self.is_cuda:
            yield waits
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        lines = (f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchronizing" in str(one.message))
        waits.update(lines)

    def clear(self, config: TrainingConfig) -> None:
        """Remove a run's folder: those of real size have 14 GB of checkpoints."""
        shutil.rmtree(config.output_dir, ignore_errors=True)

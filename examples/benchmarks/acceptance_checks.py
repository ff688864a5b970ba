"""Sections of `gpu_acceptance.py` on small models: are training, caches and checkpoints right on this device?"""

import shutil
from pathlib import Path
from typing import Any

import torch
from acceptance_bench import PROMPT, Bench, NotHereError, Outcome, require_bitsandbytes
from safetensors.torch import load_file

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.checkpointing.checkpoint import find_corruption, list_checkpoints

LEARNING_RATE = 1e-4
SHORT: dict[str, Any] = {
    "max_train_steps": 4,
    "train_batch_size": 4,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler": "constant",
    "checkpointing_steps": 2,
    "validation_steps": 2,
    "validation_prompts": [PROMPT],
    "luminance_images": 2,
    "num_inference_steps": 4,
}

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"mixed_precision": "no"},
    "bf16": {},
    "fp16": {"mixed_precision": "fp16"},
    "LoRA": {"lora_rank": 4},
    "8-bit Adam": {"use_8bit_adam": True},
    "checkpointed, EMA on the host": {"gradient_checkpointing": True, "ema_device": "cpu", "ema_update_interval": 2},
}
"""Options of whole runs."""


def limits(bench: Bench, found: Outcome) -> None:
    """What the device can do at most, to hold the rest against."""
    n = 256 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.seconds(lambda: a @ b, 3)
    found.figures["bf16_tflops"] = round(2 * n**3 / bench.seconds(lambda: a @ b, 10) / 1e12, 3)
    source = torch.empty(2**20 if bench.tiny else 2**30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.seconds(lambda: target.copy_(source))
    found.figures["copy_tb_per_s"] = round(
        2 * source.numel() / bench.seconds(lambda: target.copy_(source), 5) / 1e12, 4
    )
    for name, pinned in {"pinned": True, "pageable": False}.items() if bench.is_cuda else ():
        host = torch.empty(2**26, dtype=torch.uint8, pin_memory=pinned)
        seconds = bench.seconds(lambda host=host: host.to(bench.device), 5)
        found.figures[f"from_{name}_memory_gb_per_s"] = round(2**26 / seconds / 1e9, 1)


def whole_run(way: str) -> Any:
    """A section: a short run with previews and checkpoints, and the same continued from its middle."""

    def section(bench: Bench, found: Outcome) -> None:
        if way == "fp16" and not bench.is_cuda:
            raise NotHereError("float16 is for GPUs")
        if way == "8-bit Adam":
            require_bitsandbytes()
        config = bench.config(bench.small, **{**SHORT, **WAYS[way]})
        bench.train(config)
        folder = Path(config.output_dir)
        previews = len(list(folder.glob("previews/step-*.png")))
        found.figures["previews"] = previews
        found.expect(previews == 3, f"3 previews, and there are {previews}")
        whole = _weights(folder)
        found.expect(all(value.isfinite().all() for value in whole.values()), "finite weights")
        found.figures["resume_difference"] = difference = _difference(whole, _weights(_continued(bench, config)))
        # On a GPU sums come in any order, which turns Adam's steps of weights whose gradient is nearly zero.
        most = 4 * LEARNING_RATE if bench.is_cuda else 0.0
        found.expect(difference <= most, f"a continued run within {most:g}, and it is {difference:g} away")
        bench.clear(config)

    return section


def _continued(bench: Bench, config: TrainingConfig) -> Path:
    """Take back the second half of a run and let it be made again; its folder."""
    folder = Path(config.output_dir)
    for path in (*folder.glob("checkpoint-000004"), folder / "unet"):
        shutil.rmtree(path, ignore_errors=True)
    for name in ("model_index.json", "pytorch_lora_weights.safetensors"):
        (folder / name).unlink(missing_ok=True)
    config.resume = True
    bench.train(config)
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of the last checkpoint, which is whole."""
    last = list_checkpoints(folder)[-1]
    if defect := find_corruption(last):
        raise ValueError(f"{last.name} is damaged: {defect}")
    return load_file(last / "unet.safetensors")


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest between two states."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def precisions(bench: Bench, found: Outcome) -> None:
    """The same steps in every precision: losses differ by rounding."""
    losses: dict[str, list[float]] = {}
    for precision in ("no", "bf16", *(["fp16"] if bench.is_cuda else [])):
        trainer = bench.trainer(bench.config(bench.small, **{**SHORT, "mixed_precision": precision}))
        with trainer.batches(4) as batches:
            losses[precision] = [trainer.train_step(batches) for _ in range(4)]
    found.figures["losses"] = {name: [round(loss, 4) for loss in several] for name, several in losses.items()}
    for name, several in losses.items():
        off = max(abs(a / b - 1) for a, b in zip(several, losses["no"], strict=True))
        found.expect(off < 0.05, f"losses in {name} within 5 % of those in float32, and they are {off:.1%} off")


def caches(bench: Bench, found: Outcome) -> None:
    """Stored latents and text states give the losses of those that are computed in each step."""
    losses = {}
    for cache in ("none", "both"):
        config = bench.config(bench.small, **{**SHORT, "cache": cache, "mixed_precision": "no"})
        config.cache_dir = str(bench.folder / "fresh-cache")
        trainer = bench.trainer(config)
        with trainer.batches(3) as batches:
            losses[cache] = [trainer.train_step(batches) for _ in range(3)]
    off = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    found.figures["relative_difference"] = off
    found.expect(off < 1e-3, f"losses within 0.1 % of those without caches, and they are {off:.2%} off")
    shutil.rmtree(bench.folder / "fresh-cache")


def waits(bench: Bench, found: Outcome) -> None:
    """How often a step makes the host wait for the device but for its metrics, which are an event: never."""
    ways: dict[str, dict[str, Any]] = {
        "cached": {},
        "accumulated": {"gradient_accumulation_steps": 2},
        "uncached": {"cache": "none"},
        "fp16": {"mixed_precision": "fp16"},
        "learned uncertainty": {"loss_weighting": "learned_uncertainty"},
        "flow": {"prediction_type": "flow_prediction"},
    }
    for name, options in ways.items():
        if name == "fp16" and not bench.is_cuda:
            continue
        trainer = bench.trainer(bench.config(bench.small, **{**SHORT, **options, "max_train_steps": 5}))
        with trainer.batches(5) as batches:
            for _ in range(3):  # tables and state come to the device
                trainer.train_step(batches)
            with bench.counting_waits() as lines:
                for _ in range(2):
                    trainer.train_step(batches)
        found.figures[name] = sum(lines.values()) / 2
        found.expect(not lines, f"no wait in a step that is {name}, and there are {dict(lines)}")


def compiled(bench: Bench, found: Outcome) -> None:
    """Steps of compiled blocks have the losses of those that are not."""
    losses = {}
    for compile in ("none", "blocks"):
        trainer = bench.trainer(bench.config(bench.small, **{**SHORT, "compile": compile, "mixed_precision": "no"}))
        with trainer.batches(3) as batches:
            losses[compile] = [trainer.train_step(batches) for _ in range(3)]
    off = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    found.figures["relative_difference"] = off
    found.expect(off < 1e-3, f"losses within 0.1 % of those without compilation, and they are {off:.2%} off")

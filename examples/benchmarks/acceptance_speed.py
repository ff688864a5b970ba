"""Sections of `gpu_acceptance.py` at the sizes of Stable Diffusion 2.1 and SDXL: throughput, memory, stalls."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from acceptance_bench import PROMPT, Bench, Outcome, require_bitsandbytes
from diffusers import UNet2DConditionModel
from small_pipelines.published import PUBLISHED
from throughput_loops import Stopwatch, plain_loop

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, create_dataloader
from zsnr_diffusers.training.memory import MemoryEstimate, estimate_memory, example_inputs
from zsnr_diffusers.training.network import TrainedNetwork
from zsnr_diffusers.training.optimization import Optimization
from zsnr_diffusers.training.reporting.model_card import TrainingRecord
from zsnr_diffusers.training.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "SD 2.1": {"preset": "80gb"},
    "SD 2.1, blocks compiled": {"preset": "80gb", "compile": "blocks"},
    "SD 2.1, network compiled": {"preset": "80gb", "compile": "network", "channels_last": True},
    "SD 2.1, uncached": {"preset": "80gb", "cache": "none"},
    "SD 2.1 in 24 GB": {"preset": "24gb"},
    "SD 2.1, LoRA": {"preset": "80gb", "lora_rank": 64},
}
"""Options of the runs whose speed is measured."""
_SMALL_XL = {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 32,
    "sample_size": 8,
}


def speed(way: str, warm: int = 2, steps: int = 4) -> Any:
    """A section: images per second of a run, its utilization of the device, its memory next to the estimate."""

    def section(bench: Bench, found: Outcome) -> None:
        if WAYS[way].get("preset") == "24gb":
            require_bitsandbytes()
        options = {**WAYS[way], "dataloader_num_workers": 0 if bench.tiny else bench.workers, "luminance_images": 0}
        config = bench.config(bench.real, validation_prompts=[PROMPT], num_inference_steps=10, **options)
        started = time.perf_counter()
        trainer = bench.trainer(config)
        found.figures["start_s"] = round(time.perf_counter() - started, 1)
        _time_steps(bench, found, trainer, warm, steps)
        _compare_memory(bench, found, trainer, config)
        if way == "SD 2.1":
            look_closer(bench, found, trainer, config)
        bench.clear(config)

    return section


def _time_steps(bench: Bench, found: Outcome, trainer: Trainer, warm: int, steps: int) -> None:
    """Note the speed of steps."""
    with trainer.batches(trainer.step + warm + steps) as batches:
        found.figures["warm_up_s"] = round(bench.seconds(lambda: trainer.train_step(batches), warm) * warm, 1)
        seconds = bench.seconds(lambda: trainer.train_step(batches), steps)
    images = trainer.config.global_batch(1) / seconds
    tflops = images * bench.base(bench.real).gigaflops / 1e3
    found.figures |= {"images_per_s": round(images, 2), "s_per_step": round(seconds, 4)}
    found.figures |= {"mfu": round(tflops / bench.peak_tflops, 4)}


def _compare_memory(bench: Bench, found: Outcome, trainer: Trainer, config: TrainingConfig) -> None:
    """Note the most memory that was in use, and what `--dry_run` says."""
    task = trainer.task
    half = torch.bfloat16
    estimate = estimate_memory(task.unet, config, half, task.sample_size(), 1, task.frozen_bytes(half))
    _note_memory(bench, found, estimate)


def _note_memory(bench: Bench, found: Outcome, estimate: MemoryEstimate) -> None:
    """Note peak and estimate, which are to be within a tenth of each other."""
    gigabytes, peak = estimate.total / 1e9, bench.peak_gigabytes()
    found.figures |= {"estimate_gb": round(gigabytes, 2), "peak_gb": peak}
    if peak is not None:
        off = gigabytes / peak - 1
        found.expect(abs(off) < 0.1, f"the estimate within 10 % of the peak of {peak} GB, and it is {off:+.0%}")


def look_closer(bench: Bench, found: Outcome, trainer: Trainer, config: TrainingConfig) -> None:
    """Where a step's time goes, how fast the loader alone is, what a checkpoint and a preview cost."""
    with trainer.batches(trainer.step + 3) as batches:
        trainer.train_step(batches)
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if bench.is_cuda else activity.CPU]) as profile:
            wall = bench.seconds(lambda: trainer.train_step(batches), 2)
    if bench.is_cuda:
        events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in events) / 2e6
        found.figures["gpu_busy"] = round(busy / wall, 3)
        found.figures["kernels_per_step"] = sum(event.count for event in events) // 2
        found.figures["top_kernels"] = {
            event.key[:70]: round(event.self_device_time_total / 2e6 / busy, 3) for event in events[:12]
        }
    found.figures["loader_images_per_s"] = round(_loader_speed(bench, trainer, config), 1)
    folder = Path(config.output_dir)
    folder.mkdir()
    found.figures["checkpoint_stall_s"] = round(bench.seconds(lambda: trainer.save_checkpoint(folder, 1)), 2)
    found.figures["checkpoint_written_s"] = round(bench.seconds(trainer.saver.wait), 2)
    with trainer.export_unet() as unet, trainer.accelerator.autocast():
        record = TrainingRecord(folder, config.max_train_steps, config.describe_loss())
        output = trainer.task.create_output(config, record)
        found.figures["preview_s"] = round(bench.seconds(lambda: output.validation_images(output.pipeline(unet))), 2)


def _loader_speed(bench: Bench, trainer: Trainer, config: TrainingConfig) -> float:
    """Images per second of the loader, without training."""
    count = 4 if bench.tiny else 40
    steps = -(-(count + 4) // config.gradient_accumulation_steps)
    positions = DistributedBatchSampler(config, range(steps), 0, 1)
    batches = iter(create_dataloader(trainer.samples, positions, trainer.task.data))
    for _ in range(4):
        next(batches)
    seconds = bench.seconds(lambda: next(batches), count)
    getattr(batches, "_shutdown_workers", lambda: None)()
    return config.train_batch_size / seconds


def plain(bench: Bench, found: Outcome) -> None:
    """The same model by diffusers' own parts, which encode in every step, with the largest batch of a round number."""
    bench.forget()
    base = bench.base(bench.real)
    batch, workers = (2, 0) if bench.tiny else (32, bench.workers)
    args = argparse.Namespace(mixed_precision="bf16", batch_size=batch, resolution=base.resolution, workers=workers)
    losses = plain_loop(base.folder, base.images, args, Stopwatch(bench.device))
    bench.seconds(lambda: next(losses), 2)
    images = batch / bench.seconds(lambda: next(losses), 4)
    losses.close()
    found.figures |= {"images_per_s": round(images, 2), "peak_gb": bench.peak_gigabytes()}
    found.figures["mfu"] = round(images * base.gigaflops / 1e3 / bench.peak_tflops, 4)


def sdxl(bench: Bench, found: Outcome) -> None:
    """Memory and speed of steps of SDXL's whole UNet at 1024, without data."""
    bench.forget()
    options = {"gradient_checkpointing": True, "train_batch_size": 1 if bench.tiny else 8}
    config = TrainingConfig(pretrained_model_name_or_path="xl", train_data_dir="none", compile="none", **options)
    unet_config = {**PUBLISHED["xl"].unet, **(_SMALL_XL if bench.tiny else {})}
    with bench.device:
        unet = UNet2DConditionModel.from_config(unet_config)
    side = unet.config.sample_size
    estimate = estimate_memory(unet, config, torch.bfloat16, (side, side))
    accelerator = Accelerator(mixed_precision="bf16", cpu=not bench.is_cuda)
    network = TrainedNetwork(unet, config, accelerator)
    optimization = Optimization([{"params": network.parameters}], config, accelerator)
    inputs = _ones(example_inputs(unet, config.train_batch_size, (side, side)), bench.device)

    def step() -> None:
        with network.accumulate(last=True):
            output = network.unet(**inputs, return_dict=False)[0]
            accelerator.backward(output.float().square().mean())
            accelerator.clip_grad_norm_(network.parameters, 1.0)
            optimization.update(finite=True)
            network.update_ema()

    bench.seconds(step)
    found.figures["images_per_s"] = round(config.train_batch_size / bench.seconds(step, 2), 2)
    _note_memory(bench, found, estimate)


def _ones(inputs: Any, device: torch.device) -> Any:
    """Tensors like these, also within a dictionary, on a device."""
    if isinstance(inputs, dict):
        return {name: _ones(value, device) for name, value in inputs.items()}
    return torch.ones_like(inputs, device=device)

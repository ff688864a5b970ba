"""Estimate the duration of a run by timing some steps."""

import time

import torch

from .trainer import Trainer

_WARMUP_STEPS, _MEASURED_STEPS, _MEASURED_SECONDS = 3, 50, 60


def time_training_steps(trainer: Trainer) -> str:
    """Time some training steps, and report how long the whole run would take; nothing is written.

    Args:
        trainer: of the run.
    """
    accelerator, max_train_steps = trainer.accelerator, trainer.config.max_train_steps
    images = trainer.config.global_batch(accelerator.num_processes)
    times = [time.perf_counter()]
    with trainer.batches(trainer.step + _WARMUP_STEPS + _MEASURED_STEPS) as batches:
        for _ in range(_WARMUP_STEPS + _MEASURED_STEPS):
            trainer.train_step(batches)
            times.append(time.perf_counter())
            if times[-1] - times[0] > _MEASURED_SECONDS and len(times) > _WARMUP_STEPS + 1:
                break
    steps = len(times) - 1 - _WARMUP_STEPS
    seconds = (times[-1] - times[_WARMUP_STEPS]) / steps
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"measured: {images / seconds:.1f} images/s, {seconds:.3f} s per step over {steps} steps on "
        f"{accelerator.num_processes} x {name} in {accelerator.mixed_precision} precision; {max_train_steps:,} steps "
        f"would take {seconds * max_train_steps / 3600:,.1f} hours"
    )

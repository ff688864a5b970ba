"""What tests of training look at when a run is over."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zsnr_diffusers.training import train
from zsnr_diffusers.training.accelerator import create_accelerator
from zsnr_diffusers.training.reporting.model_card import TrainingRecord


def trained(config):
    """Run a configuration; the weights that it ships."""
    train(config)
    return weights(config.output_dir)


def weights(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def launched(config):
    """The accelerator and the processes of a configuration."""
    return create_accelerator(config, config.gradient_accumulation_steps, config.report_to, config.output_dir)


def shown(config):
    """How many samples a run in one process shows."""
    return config.max_train_steps * config.global_batch(1)


def output_of(task):
    """What comes out of a task on Stable Diffusion that was opened by a whole configuration."""
    config = task.config
    record = TrainingRecord(Path(config.output_dir), config.max_train_steps, config.describe_loss())
    return task.create_output(config.of_result(), record)


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logged(folder):
    """Every scalar's (step, value), by name."""
    events = EventAccumulator(str(Path(folder) / "logs")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

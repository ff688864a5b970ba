"""Runs of training whose latents and text states are stored, and what is in the store."""

import json
from collections import namedtuple
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import default_collate
from training_runs import shown

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.utils.distributed import Processes

Prepared = namedtuple("Prepared", "task samples")
CPU = torch.device("cpu")
N_TEXTS = 7
"""Six captions and the empty one."""


def prepare(options, **changes):
    """A task whose caches are filled, and its samples."""
    config = TrainingConfig(**{**options, **changes})
    AcceleratorState._reset_state(True)  # of another precision
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision or "no")
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config))
    task.plan_cache(accelerator, Processes(), samples, shown(config))
    return Prepared(task, task.prepare(accelerator, Processes(), samples))


def inputs_of_unet(prepared, positions):
    """x_0 [n, 4, 4, 4] and text states [n, 16, 8] of samples, batch after batch."""
    task, samples = prepared
    seen = []
    for position in positions:
        batch = task.encode(default_collate([samples[position], samples[position + 1]]))
        x_0 = task.x_0(batch)
        task.predict(lambda x, t, text, return_dict, x_0=x_0: seen.append((x_0, text)) or (x,), x_0, batch)
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def shards(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


def captions(folder):
    return [json.loads(line)["text"] for line in (Path(folder) / "metadata.jsonl").read_text().splitlines()]


def caption_all(folder, texts):
    names = sorted(path.name for path in Path(folder).glob("*.png"))
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (Path(folder) / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def change_image(own):
    Image.new("RGB", (16, 16), "red").save(Path(own["train_data_dir"]) / "00003.png")
    return {}


def change_caption(own):
    caption_all(own["train_data_dir"], ["a cat", *captions(own["train_data_dir"])[1:]])
    return {}

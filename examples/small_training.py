"""Training of networks that take minutes: a short loop of their own, and `zsnr_diffusers.training` with settings for
them.
"""

import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints

WARMUP_STEPS, EMA_DECAY = 50, 0.999


def minimize(
    unet: ModelMixin,
    loss_of_a_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    look: Callable[[int], None] | None = None,
    look_after: Container[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train a network with AdamW, a warm-up and clipped gradients; its averaged weights are left in it.

    Args:
        unet: what is trained.
        loss_of_a_batch: draws a batch and returns its loss.
        steps: how many.
        learning_rate: after the warm-up.
        name: of the progress bar.
        look: called with the step count made, while the averaged weights are in the network.
        look_after: at which numbers.
        on_step: called with the number of steps made after each.
    """
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY)
    unet.train()
    for step in (progress := tqdm(range(1, steps + 1), desc=name)):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        ema.step(unet.parameters())
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if on_step is not None:
            on_step(step)
        if look is not None and step in look_after:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            look(step)
            ema.restore(unet.parameters())
            unet.train()
    ema.copy_to(unet.parameters())
    unet.eval()


def train_stable_diffusion(output: Path, steps: int, on_step: Callable[[int], None], **options: Any) -> None:
    """Train a small Stable Diffusion as `zsnr train` would, on from where an interrupted run stopped.

    Args:
        output: folder of the trained pipeline; no checkpoints are left in it.
        steps: how many.
        on_step: called with the number of steps made after each.
        options: of `TrainingConfig`, `pretrained_model_name_or_path` and `train_data_dir` among them.
    """
    settings = {
        "train_batch_size": 16,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(50, steps // 4),
        "ema_decay": 0.999,
        "luminance_images": 0,  # the examples measure when all is done
        "report_to": "none",
        "dataloader_num_workers": 0,  # so small a network is faster than what they would cost
        "resume": True,
    }
    config = TrainingConfig(output_dir=str(output), max_train_steps=steps, **{**settings, **options})
    train(config, on_step=on_step)
    for checkpoint in list_checkpoints(output):
        shutil.rmtree(checkpoint)

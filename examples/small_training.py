"""A training loop for networks that are trained in minutes; the real one is `zsnr_diffusers.training`."""

from collections.abc import Callable, Container

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

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

"""What `train_throughput.py` compares: a plain loop of stock parts, and our trainer timed from outside."""

import argparse
import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.run import create_trainer  # what `train` trains to the end; here it takes turns
from zsnr_diffusers.training.speed import matmul_precision
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.training.trainer import Trainer
from zsnr_diffusers.utils.distributed import Processes

SPEED = ("channels_last", "compile", "use_8bit_adam", "allow_tf32")
"""Options of our trainer, which are its own here."""


class Stopwatch:
    """Seconds by part of a step, while it is on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.seconds = device, False, Counter[str]()
        self._inner = 0.0

    def now(self) -> float:
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what is inside, without the parts that are timed within it."""
        if not self.on:
            yield
            return
        started, outer, self._inner = self.now(), self._inner, 0.0
        yield
        spent = self.now() - started
        self.seconds[part] += spent - self._inner
        self._inner = outer + spent

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of an attribute."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return call(*args, **kwargs)

        setattr(owner, name, timed)

    def each(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, timed as data."""
        while True:
            with self("data"):
                batch = next(batches)
            yield batch


def plain_loop(base: Path, data: Path, args: argparse.Namespace, watch: Stopwatch) -> Iterator[float]:
    """Encode and train with stock parts, as a script would."""
    device = watch.device
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    vae, text_encoder, unet = pipe.vae.to(device), pipe.text_encoder.to(device), pipe.unet.to(device).train()
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).to(half or torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(device)
    scheduler = stock_scheduler(pipe)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    for pixel_values, input_ids in watch.each(plain_batches(pipe.tokenizer, data, args)):
        loss = plain_loss(vae, text_encoder, unet, scheduler, pixel_values.to(device), input_ids.to(device), watch)
        with watch("backward"):
            scaler.scale(loss).backward()
        with watch("optimizer"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        with watch("EMA"):
            ema.step(unet.parameters())
        yield loss.item()


def plain_loss(
    vae: Any,
    text_encoder: Any,
    unet: Any,
    scheduler: DDPMScheduler,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    watch: Stopwatch,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean v-loss of a batch."""
    with torch.no_grad(), watch("VAE"):
        latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.sample(generator) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator, device=latents.device)
    noisy, target = (f(latents, noise, timesteps) for f in (scheduler.add_noise, scheduler.get_velocity))
    with torch.no_grad(), watch("text"):
        states = text_encoder(input_ids)[0]
    with watch("forward"), torch.autocast(latents.device.type, vae.dtype, enabled=vae.dtype != torch.float32):
        output = unet(noisy, timesteps, states, return_dict=False)[0]
    return F.mse_loss(output.float(), target.float())


def stock_scheduler(pipe: StableDiffusionPipeline) -> DDPMScheduler:
    """Stock's own zero terminal SNR and v."""
    return DDPMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )


def plain_batches(tokenizer: Any, data: Path, args: argparse.Namespace) -> Iterator[Any]:
    """Images and token ids, shuffled, without end."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")

    def sample(row: dict[str, list[Any]]) -> dict[str, list[Any]]:
        size = (args.resolution, args.resolution)
        fitted = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR) for image in row["image"]]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in fitted]
        ids = tokenizer(row["text"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"pixels": pixels, "ids": list(ids)}

    loader = DataLoader(
        rows.with_transform(sample),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        collate_fn=lambda many: tuple(torch.stack([one[name] for one in many]) for name in ("pixels", "ids")),
    )
    while True:
        yield from loader


def our_run(base: Path, data: Path, args: argparse.Namespace, cache: str, precision: str | None = None) -> Trainer:
    """What `train` runs, before its first step, in another precision than the plain loop if one is passed."""
    config = TrainingConfig(
        pretrained_model_name_or_path=str(base),
        train_data_dir=str(data),
        output_dir=str(data.parent / "run"),
        cache=cache,
        resolution=args.resolution,
        train_batch_size=args.batch_size,
        mixed_precision=precision or args.mixed_precision,
        dataloader_num_workers=args.workers,
        report_to="none",
        **{name: getattr(args, name) for name in SPEED},
    )
    return new_trainer(config, on_cpu=args.device == "cpu")


def new_trainer(config: TrainingConfig, on_cpu: bool) -> Trainer:
    """The trainer of a configuration, before its first step, beside others of the process."""
    # All accelerators of a process share their state, precision among it; those that exist keep what they have.
    AcceleratorState._shared_state = {}
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=on_cpu,
    )
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config, progress=False), config.global_batch(1))
    task.plan_cache(accelerator, Processes(), samples, config.max_train_steps * config.global_batch(1))
    return create_trainer(config, accelerator, Processes(), task, samples)


def our_loop(run: Trainer, watch: Stopwatch, allow_tf32: bool) -> Iterator[float]:
    """Our trainer, timed from outside."""
    for owner, name, part in (
        (run.task, "autoencoder", "VAE"),
        (run.task, "text_encoder", "text"),
        (run.task, "predict", "forward"),  # the text encoder is in it, or nothing else
        (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "optimizer"),
        (run.optimization.optimizer, "step", "optimizer"),
        (run.network, "update_ema", "EMA"),
    ):
        watch.watch(owner, name, part)
    with run.batches(run.config.max_train_steps) as batches:
        timed = watch.each(batches)
        while True:
            with matmul_precision(allow_tf32):
                loss = run.train_step(timed)
            yield loss

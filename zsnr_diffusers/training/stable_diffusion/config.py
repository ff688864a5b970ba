"""What a run on Stable Diffusion depends on."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ...core.guidance import check_guidance_rescale
from ...guidance import DEFAULT_GUIDANCE_RESCALE
from ..config import RunConfig, option

EXAMPLES = """\
examples:
  # what would happen, without training
  python -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  # how fast it would be here, without data
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --dry_run --measure

  # a folder of pictures with captions in metadata.jsonl ({"file_name": "0001.jpg", "text": "a night sky"} per line)
  accelerate launch -m zsnr_diffusers.training \\
      --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1-base \\
      --train_data_dir photos --output_dir sd21-zsnr --mixed_precision bf16

  # go on after an interruption
  accelerate launch -m zsnr_diffusers.training --config sd21-zsnr/training_config.yaml --resume
"""


@dataclass
class TrainingConfig(RunConfig):
    """Everything that a run on Stable Diffusion depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    pretrained_model_name_or_path: str = option(
        "", "Stable Diffusion 1.x or 2.x pipeline to start from, epsilon or v: a Hub id or a local folder."
    )
    train_data_dir: str | None = option(None, "Folder of images with a metadata.jsonl, instead of --dataset_name.")
    caption_column: str = option("text", "Column of the captions; of a list of captions one is drawn each time.")
    caption_dropout: float = option(0.1, "Share of captions replaced by the empty one, for classifier-free guidance.")
    max_train_steps: int = option(10_000, "Optimizer steps. The paper took 50,000 at batch size 2048.")
    learning_rate: float = option(1e-5, "AdamW's learning rate. The paper took 1e-4 at batch size 2048.")
    cache: Literal["auto", "none", "latents", "text", "both"] = option(
        "auto",
        "What autoencoder and text encoder give is computed once and stored: latents, text, both, none, or auto: what "
        "fits into half of the free disk space.",
    )
    cache_dir: str | None = option(
        None, "Where it is stored; runs may share it, also at the same time. Default: `cache` in --output_dir."
    )
    validation_prompts: list[str] = option([], "Prompts of the previews.")  # noqa: RUF009
    guidance_scale: float = option(7.5, "Guidance scale of the previews.")
    guidance_rescale: float = option(
        DEFAULT_GUIDANCE_RESCALE, "Guidance rescale of the previews, recommended on the model card."
    )

    program: ClassVar[str] = "python -m zsnr_diffusers.training"
    description: ClassVar[str] = (
        "Retrain Stable Diffusion 1.x or 2.x so that it can paint truly dark and truly bright pictures: v-loss on a\n"
        "schedule that ends at zero signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891). The result is an\n"
        "ordinary diffusers pipeline in --output_dir. For networks of pixels: python -m zsnr_diffusers.training.pixels"
    )
    examples: ClassVar[str] = EXAMPLES
    decides: ClassVar[tuple[str, ...]] = ("pretrained_model_name_or_path", *RunConfig.decides)
    not_negative: ClassVar[tuple[str, ...]] = (*RunConfig.not_negative, "guidance_scale")
    shares: ClassVar[tuple[str, ...]] = (*RunConfig.shares, "caption_dropout")

    @property
    def cache_folder(self) -> Path:
        """Where the results of autoencoder and text encoder are stored."""
        return Path(self.output_dir, "cache") if self.cache_dir is None else Path(self.cache_dir)

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError("--pretrained_model_name_or_path is missing: a Hub id or the folder of a pipeline.")
        super().__post_init__()
        check_guidance_rescale(self.guidance_rescale)

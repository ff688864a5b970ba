"""What a run on a pixel-space network depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ...core.choices import check_variance_type
from ...unet import PRESETS
from ..config import (
    IDENTITY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    DataConfig,
    Options,
    OutputConfig,
    RunConfig,
    option,
)
from .recipes import RECIPES

EXAMPLES = """\
examples:
  # the paper's CIFAR10 network and recipe, and its twin with zero terminal SNR and v-loss
  accelerate launch -m zsnr_diffusers.training.pixels --recipe cifar10-ddpm --mixed_precision bf16 \\
      --dataset_name uoft-cs/cifar10 --image_column img --output_dir cifar10-ddpm
  accelerate launch -m zsnr_diffusers.training.pixels --recipe cifar10-ddpm-zsnr --mixed_precision bf16 \\
      --dataset_name uoft-cs/cifar10 --image_column img --output_dir cifar10-ddpm-zsnr

  # class-conditional: a folder with a folder of images for each class
  accelerate launch -m zsnr_diffusers.training.pixels --unet small-32 \\
      --train_data_dir animals --class_column label --output_dir animals-zsnr

  # a rectified flow
  accelerate launch -m zsnr_diffusers.training.pixels --unet small-32 --prediction_type flow_prediction \\
      --train_data_dir animals --class_column label --output_dir animals-flow

  # how fast it would be here, without data
  accelerate launch -m zsnr_diffusers.training.pixels --recipe cifar10-ddpm --dry_run --measure

  # continue after an interruption
  accelerate launch -m zsnr_diffusers.training.pixels --config animals-zsnr/training_config.yaml --resume

layout of --train_data_dir with --class_column label:
  animals/
    cat/0001.png       all images at one depth; a class may be called train, too
    cat/0002.jpg
    dog/0001.webp
  or animals/train/cat/... beside animals/test/cat/..., of which train/ is used. Other columns of classes come from a
  metadata.jsonl, .csv or .parquet with file_name.
"""


@dataclass
class NetworkConfig(Options):
    """The network and schedule that a run starts from."""

    pretrained_model_name_or_path: Annotated[str | None, IDENTITY] = option(
        None,
        "Pipeline of pixels to start from, a Hub id or a local folder, in place of a new network and schedule.",
    )
    unet: Annotated[str, IDENTITY] = option("small-32", f"New network: {', '.join(PRESETS)}.")
    in_channels: Annotated[Literal[1, 3], IDENTITY] = option(3, "Channels of a new network: 3 for colour, 1 for grey.")
    dropout: float | None = option(None, "Dropout of a new network. Default: the preset's.")
    beta_schedule: Annotated[str, IDENTITY] = option("linear", "Schedule of a new network, as in diffusers.")
    beta_start: Annotated[float, POSITIVE, IDENTITY] = option(1e-4, "Its first beta.")
    beta_end: Annotated[float, POSITIVE, IDENTITY] = option(0.02, "Its last beta.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet not in PRESETS:
            raise ValueError(f"--unet={self.unet!r} is no preset; choose one of {', '.join(PRESETS)}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout} must lie in [0, 1).")


@dataclass
class ClassDataConfig(DataConfig):
    """Images, of given classes or not."""

    class_column: Annotated[str | None, IDENTITY] = option(
        None,
        "Column of the classes, for images of given classes; `label` for a folder of folders. Tars in --train_shards "
        "have none; of parquet files, the whole column is read before the start.",
    )
    class_dropout: Annotated[float, SHARE] = option(
        0.1, "Share of classes replaced by none, for classifier-free guidance."
    )

    dataloader_num_workers: Annotated[int | None, NOT_NEGATIVE] = option(
        0,
        "Processes that read images for each process that trains. Default: 0, it reads them itself and keeps them "
        "decoded, up to 1 GB of them; each of these processes would keep its own. Of more images, or large ones, "
        "give each GPU 4 to 8.",
    )

    @property
    def columns(self) -> dict[str, str]:
        """Data columns to read, that of classes included."""
        classes = {} if self.class_column is None else {"class_column": self.class_column}
        return {**super().columns, **classes}


@dataclass
class PixelOutputConfig(OutputConfig):
    """What a run writes, and how its images are sampled."""

    variance_type: str = option(
        "fixed_small", "Variance of the sampler that is shipped: fixed_small or fixed_large (Ho et al. 2020)."
    )
    validation_images: Annotated[int, NOT_NEGATIVE] = option(
        4, "Images per class in previews, or per row without classes; 0 for none."
    )
    num_inference_steps: Annotated[int, POSITIVE] = option(100, "Sampling steps of the previews.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variance_type(self.variance_type)


@dataclass
class PixelTrainingConfig(PixelOutputConfig, ClassDataConfig, NetworkConfig, RunConfig):
    """Everything that a run on a pixel-space network depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    train_batch_size: Annotated[int, POSITIVE] = option(64, "Images per process and forward pass.")
    learning_rate: Annotated[float, POSITIVE] = option(2e-4, "Learning rate.")
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(0.0, "Weight decay; with 0 AdamW is Adam.")

    program: ClassVar[str] = "python -m zsnr_diffusers.training.pixels"
    description: ClassVar[str] = (
        "Train a pixel-space network from scratch, with classes or without, by the recipe of DDPM (Ho et al. 2020,\n"
        "arXiv:2006.11239), with v-loss and zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), or as a rectified\n"
        "flow. The result is a diffusers pipeline in --output_dir: DDPMPipeline, or ClassConditionalPipeline of this\n"
        "package."
    )
    examples: ClassVar[str] = EXAMPLES
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = RECIPES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow_through_bridge and self.pretrained_model_name_or_path is None:
            raise ValueError("--flow_through_bridge converts a base, and a new network has none: leave it out.")

    @classmethod
    def from_recipe(cls, name: str, **options: Any) -> "PixelTrainingConfig":
        """The configuration of a recipe, with options that win over it.

        Raises:
            ValueError: no recipe of that name, and as in the class.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe {name!r} is not known; choose one of {', '.join(RECIPES)}.")
        return cls(**{**RECIPES[name], **options})

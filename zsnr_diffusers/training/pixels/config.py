"""Configuration of a run on a pixel-space network."""

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
    TaskConfig,
    option,
)
from .recipes import RECIPES

EXAMPLES = """\
examples:
  # the paper's CIFAR10 network and recipe, and the same with zero terminal SNR and v-prediction
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

  # measure the speed on this machine, without data
  accelerate launch -m zsnr_diffusers.training.pixels --recipe cifar10-ddpm --dry_run --measure

  # continue after an interruption
  accelerate launch -m zsnr_diffusers.training.pixels --config animals-zsnr/training_config.yaml --resume

layout of --train_data_dir with --class_column label:
  animals/
    cat/0001.png       all images at one depth; a class may be called train
    cat/0002.jpg
    dog/0001.webp
  or animals/train/cat/... with animals/test/cat/...; then train/ is used. Other class columns come from a
  metadata.jsonl, .csv or .parquet with file_name.
"""


@dataclass
class NetworkConfig(Options):
    """The initial network and schedule of a run."""

    pretrained_model_name_or_path: Annotated[str | None, IDENTITY] = option(
        None,
        "Pixel-space pipeline to start from, a Hub id or a local folder, instead of a new network and schedule.",
    )
    unet: Annotated[str, IDENTITY] = option("small-32", f"New network: {', '.join(PRESETS)}.")
    in_channels: Annotated[Literal[1, 3], IDENTITY] = option(3, "Channels of a new network: 3 for color, 1 for gray.")
    dropout: float | None = option(None, "Dropout of a new network. Default: the preset's.")
    beta_schedule: Annotated[str, IDENTITY] = option("linear", "Schedule of a new network, as in diffusers.")
    beta_start: Annotated[float, POSITIVE, IDENTITY] = option(1e-4, "First beta of a new schedule.")
    beta_end: Annotated[float, POSITIVE, IDENTITY] = option(0.02, "Last beta of a new schedule.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet not in PRESETS:
            raise ValueError(f"--unet={self.unet!r} is not a preset; choose one of {', '.join(PRESETS)}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout} must lie in [0, 1).")


@dataclass
class ClassDataConfig(DataConfig):
    """Images, optionally with classes."""

    class_column: Annotated[str | None, IDENTITY] = option(
        None,
        "Column of the classes, for class-conditional training; `label` uses the names of subfolders. Tars in "
        "--train_shards have no classes; for parquet files, the complete column is read before the start.",
    )
    class_dropout: Annotated[float, SHARE] = option(
        0.1, "Fraction of samples without their class, for classifier-free guidance."
    )

    dataloader_num_workers: Annotated[int | None, NOT_NEGATIVE] = option(
        0,
        "Number of data loading workers per training process. Default: 0, the training process reads images itself "
        "and keeps up to 1 GB of them decoded (each worker would have its own copy). For more or larger images, use "
        "4 to 8 per GPU.",
    )

    @property
    def columns(self) -> dict[str, str]:
        """Data columns to read, that of classes included."""
        classes = {} if self.class_column is None else {"class_column": self.class_column}
        return {**super().columns, **classes}


@dataclass
class VarianceConfig(Options):
    """The variance of the reverse process, which is not trained."""

    variance_type: str = option(
        "fixed_small", "Variance of the saved sampler: fixed_small or fixed_large (Ho et al. 2020)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variance_type(self.variance_type)


@dataclass
class PixelTaskConfig(VarianceConfig, ClassDataConfig, NetworkConfig, TaskConfig):
    """What a pixel-space task reads: network and schedule, data and objective."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow_through_bridge and self.pretrained_model_name_or_path is None:
            raise ValueError("--flow_through_bridge converts a base, but a new network has none: omit it.")


@dataclass
class PixelOutputConfig(OutputConfig):
    """What a run writes, and how its images are sampled."""

    validation_images: Annotated[int, NOT_NEGATIVE] = option(
        4, "Images per class in previews, or per row without classes; 0 for none."
    )
    num_inference_steps: Annotated[int, POSITIVE] = option(100, "Sampling steps of the previews.")


@dataclass
class PixelTrainingConfig(PixelOutputConfig, PixelTaskConfig, RunConfig):
    """Everything that a run on a pixel-space network depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    train_batch_size: Annotated[int, POSITIVE] = option(64, "Images per process and forward pass.")
    learning_rate: Annotated[float, POSITIVE] = option(2e-4, "Learning rate.")
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(0.0, "Weight decay; with 0 AdamW is Adam.")

    program: ClassVar[str] = "python -m zsnr_diffusers.training.pixels"
    description: ClassVar[str] = (
        "Train a pixel-space network from scratch, with or without classes, using the recipe of DDPM (Ho et al.\n"
        "2020, arXiv:2006.11239), with v-prediction and zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), or as\n"
        "a rectified flow. The result is a diffusers pipeline in --output_dir: DDPMPipeline, or this package's\n"
        "ClassConditionalPipeline."
    )
    examples: ClassVar[str] = EXAMPLES
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = RECIPES

    @classmethod
    def from_recipe(cls, name: str, **options: Any) -> "PixelTrainingConfig":
        """The configuration of a recipe, with options that win over it.

        Raises:
            ValueError: no recipe of that name, and as in the class.
        """
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}.")
        return cls(**{**RECIPES[name], **options})

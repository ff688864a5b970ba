"""One dataclass is the configuration, the command line and the YAML file."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..core.guidance import check_guidance_rescale
from ..core.predictions import check_prediction_type
from ..guidance import DEFAULT_GUIDANCE_RESCALE

DESCRIPTION = """\
Retrain Stable Diffusion 1.x or 2.x so that it can paint truly dark and truly bright pictures: v-loss on a schedule
that ends at zero signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891). The result is an ordinary diffusers
pipeline in --output_dir.
"""

EXAMPLES = """\
examples:
  # what would happen, without training
  python -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  # a folder of pictures with captions in metadata.jsonl ({"file_name": "0001.jpg", "text": "a night sky"} per line)
  accelerate launch -m zsnr_diffusers.training \\
      --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1-base \\
      --train_data_dir photos --output_dir sd21-zsnr --mixed_precision bf16

  # go on after an interruption
  accelerate launch -m zsnr_diffusers.training --config sd21-zsnr/training_config.yaml --resume
"""


def _option(default: Any, text: str) -> Any:
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainingConfig:
    """Everything that a run depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    pretrained_model_name_or_path: str = _option(
        "", "Stable Diffusion 1.x or 2.x pipeline to start from, epsilon or v: a Hub id or a local folder."
    )
    output_dir: str = _option("outputs/zsnr", "Where the pipeline, checkpoints, previews and logs go.")
    dataset_name: str | None = _option(None, "Data set of the Hub, or anything `datasets.load_dataset` opens.")
    train_data_dir: str | None = _option(None, "Folder of images with a metadata.jsonl, instead of --dataset_name.")
    image_column: str = _option("image", "Column of the images.")
    caption_column: str = _option("text", "Column of the captions; of a list of captions one is drawn each time.")
    resolution: int | None = _option(
        None, "Pixels per side; images are resized and centre-cropped. Default: the model's."
    )
    random_flip: bool = _option(False, "Mirror half of the images.")
    on_bad_image: Literal["fail", "skip"] = _option(
        "fail", "What to do about images that cannot be read: stop before training, or leave them out. Both name them."
    )
    caption_dropout: float = _option(0.1, "Share of captions replaced by the empty one, for classifier-free guidance.")
    prediction_type: str = _option(
        "v_prediction", "What the UNet learns: v_prediction, or epsilon or sample to compare."
    )
    rescale_betas_zero_snr: bool = _option(
        True, "Train on zero terminal SNR. False keeps the base's schedule, to compare."
    )
    max_train_steps: int = _option(10_000, "Optimizer steps. The paper took 50,000 at batch size 2048.")
    train_batch_size: int = _option(8, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.")
    learning_rate: float = _option(1e-5, "AdamW's learning rate. The paper took 1e-4 at batch size 2048.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = _option("constant_with_warmup", "Schedule of the learning rate, as in diffusers.")
    lr_warmup_steps: int = _option(
        500, "Steps over which the learning rate rises from 0, if its schedule has a warm-up."
    )
    adam_weight_decay: float = _option(1e-2, "AdamW's weight decay.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = _option(
        0.9999, "Decay of the moving average of the weights, which is what is saved; 0 for none."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "Arithmetic of the forward pass; the weights stay float32. Default: what accelerate is configured for."
    )
    gradient_checkpointing: bool = _option(False, "Trade time for memory.")
    seed: int = _option(0, "Decides on all randomness: same seed, same weights, however often a run was interrupted.")
    dataloader_num_workers: int = _option(0, "Processes that read images.")
    checkpointing_steps: int = _option(500, "Steps between checkpoints.")
    checkpoints_total_limit: int = _option(2, "Checkpoints kept, the newest.")
    resume: bool = _option(False, "Go on from the newest checkpoint in --output_dir, or start if there is none.")
    validation_prompts: list[str] = _option([], "Prompts of the previews.")  # noqa: RUF009
    validation_steps: int = _option(500, "Steps between previews.")
    guidance_scale: float = _option(7.5, "Guidance scale of the previews.")
    guidance_rescale: float = _option(
        DEFAULT_GUIDANCE_RESCALE, "Guidance rescale of the previews, recommended on the model card."
    )
    num_inference_steps: int = _option(30, "Sampling steps of the previews.")
    report_to: str = _option("tensorboard", "Tracker: tensorboard (in output_dir/logs), wandb, ..., or none.")
    dry_run: bool = _option(False, "Check everything, print the resolved configuration and the plan, and stop.")

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type, zero_terminal_snr=self.rescale_betas_zero_snr)
        check_guidance_rescale(self.guidance_rescale)
        if not self.pretrained_model_name_or_path:
            raise ValueError("--pretrained_model_name_or_path is missing: a Hub id or the folder of a pipeline.")
        if bool(self.dataset_name) == bool(self.train_data_dir):
            raise ValueError("Pass the data as either --dataset_name or --train_data_dir.")
        for option in dataclasses.fields(self):
            choices, value = _choices(option.type), getattr(self, option.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{option.name}={value!r} is not known; choose one of {', '.join(choices)}.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}={value} must be above 0.")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}={getattr(self, name)} must not be negative.")
        for name in ("caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)} must lie in [0, 1].")

    def to_yaml(self) -> str:
        """The configuration as the YAML that `--config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _choices(kind: Any) -> tuple[str, ...]:
    """What a `Literal` option, or one that may also be None, can be; argparse checks the command line alone."""
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return get_args(literal)


_POSITIVE = (
    "resolution",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "max_grad_norm",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_inference_steps",
)
_NOT_NEGATIVE = ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers", "guidance_scale")


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration of a command line; options override the YAML file of `--config`.

    Args:
        argv: arguments without the program's name; those of this process by default.

    Raises:
        SystemExit: an option is unknown or wrong (exit status 2, the message on standard error), or `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        TrainingConfig,
        prog="python -m zsnr_diffusers.training",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options; those on the command line win.")
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    path = file.parse_known_args(argv)[0].config
    try:
        if path:
            parser.set_defaults(**_read_yaml(path))
        options = vars(parser.parse_args(argv))
        options.pop("config")
        return TrainingConfig(**options)
    except TypeError as error:  # of a value that YAML can express and a command line cannot: null, a list
        parser.error(f"--config {path}: an option has a value of the wrong type: {error}")
    except ValueError as error:
        parser.error(str(error))
    raise AssertionError("unreachable: parser.error exits")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the examples as they are written."""


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold options, one `name: value` per line.")
    known = {f.name: f.type for f in dataclasses.fields(TrainingConfig)}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"--config {path}: unknown options {', '.join(unknown)}.")
    # YAML 1.1 reads 1e-5 as a string, where a float option means the number, and the precision `no` as false.
    options = {name: float(value) if known[name] is float else value for name, value in options.items()}
    return options | ({"mixed_precision": "no"} if options.get("mixed_precision") is False else {})

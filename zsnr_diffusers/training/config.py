"""One dataclass per kind of run is the configuration, the command line and the YAML file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml

from ..core import check_loss_weighting
from ..core.predictions import check_prediction_type

_WARMUP_STEPS = 500


def option(default: Any, text: str) -> Any:
    """A field with its default and what `--help` says of it."""
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """What every run depends on, whatever it trains.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    output_dir: str = option("outputs/zsnr", "Where the pipeline, checkpoints, previews and logs go.")
    dataset_name: str | None = option(None, "Data set of the Hub, or anything `datasets.load_dataset` opens.")
    train_data_dir: str | None = option(
        None,
        "Folder of images at any depth, instead of --dataset_name; layouts are below. A metadata.jsonl, .csv or "
        ".parquet in it, or in folders of it, describes its images: file_name, relative to itself, beside other "
        "columns. Of a folder that holds train/ beside test/ or validation/ and nothing else, train/ is used. Images "
        "that are left out are counted, and some of them named.",
    )
    train_shards: str | None = option(
        None,
        "Tar shards in WebDataset's layout, instead of --dataset_name: s3://bucket/{0000..0127}.tar, /data/*.tar, or "
        "whatever fsspec opens. A sample is 0001.jpg beside 0001.txt or 0001.json. Rows are read by range, so no disk "
        "has to hold them; where they lie is found once by reading the tars' headers, and stored in --cache_dir. "
        "Images are not checked before the start: --on_bad_image counts when one comes up.",
    )
    shuffle_shards: int = option(
        16,
        "Shards whose rows are shuffled together: each epoch takes all shards in another order, as many at a time. "
        "More mix better, fewer are kinder to caches between here and the data. Rows of one shard should be mixed "
        "already.",
    )
    image_column: str = option("image", "Column of the images.")
    resolution: int | None = option(
        None, "Pixels per side; images are resized and centre-cropped. Default: the model's."
    )
    random_flip: bool = option(False, "Mirror half of the images.")
    on_bad_image: Literal["fail", "skip"] = option(
        "fail",
        "What to do about images that cannot be read: stop before training, or leave them out. Both name them. Those "
        "of --train_shards are met on the way: fail ends with a checkpoint to go on from, skip shows the next row.",
    )
    prediction_type: str = option(
        "v_prediction", "What the UNet learns: v_prediction, or epsilon or sample to compare."
    )
    rescale_betas_zero_snr: bool = option(
        True, "Train on zero terminal SNR. False keeps the schedule as it is, to compare."
    )
    loss_weighting: Literal[
        "constant", "min_snr_floored", "soft_min_snr_floored", "learned_uncertainty", "min_snr"
    ] = option(
        "constant",
        "Weight of each timestep in the loss. constant: 1 (the paper). min_snr_floored, soft_min_snr_floored: less "
        "for timesteps of little noise, and still 1 for the last one under v-loss. learned_uncertainty: each loss "
        "over its expected size, learned on the way (EDM2); what is then logged as loss may be negative. min_snr: "
        "refused on zero terminal SNR, where the last timestep would have weight 0 and stay untrained.",
    )
    snr_gamma: float = option(5.0, "SNR above which timesteps weigh less in the min_snr weightings.")
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "uniform",
        "How timesteps are drawn; each is uniform over all of them. uniform: independently. stratified: one from "
        "each part of an even division, over the global batch of a step. antithetic: in pairs t and T - 1 - t. The "
        "last two make the loss of a step vary less.",
    )
    noise_offset: float = option(
        0.0,
        "Standard deviation of noise that each channel gets as a whole, to compare: another remedy for pictures of "
        "medium brightness, refused on zero terminal SNR, which replaces it: there the last timestep must be N(0, I).",
    )
    max_train_steps: int = option(10_000, "Optimizer steps.")
    train_batch_size: int = option(8, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    learning_rate: float = option(1e-5, "AdamW's learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = option("constant_with_warmup", "Schedule of the learning rate, as in diffusers.")
    lr_warmup_steps: int | None = option(
        None,
        "Steps over which the learning rate rises from 0, if its schedule has a warm-up. Default: 500, or a tenth of "
        "--max_train_steps in a run of up to 500.",
    )
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay; with 0 it is Adam.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    nan_skip: int = option(
        0, "How many steps in a row may be left out because the loss or the gradients are NaN or infinite."
    )
    ema_decay: float = option(
        0.9999, "Decay of the moving average of the weights, which is what is saved; 0 for none."
    )
    ema_warmup: bool = option(
        True, "Let the decay rise to its value, so that the first weights are soon forgotten. False: constant."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Arithmetic of the forward pass; the weights stay float32. Default: what accelerate is configured for."
    )
    allow_tf32: bool = option(
        False,
        "Let matrix products in float32 round their factors to TF32 on GPUs that have it (Ampere and later). Off as "
        "in torch; under bf16 or fp16 there is little left that it could speed up. Convolutions use it anyway.",
    )
    channels_last: bool = option(
        False, "Keep weights in the memory layout that convolutions on tensor cores want; files have the usual one."
    )
    compile: Literal["none", "blocks", "network"] = option(
        "none",
        "torch.compile, which takes minutes before the first step. blocks: the transformer blocks, once for all of a "
        "kind. network: all of it.",
    )
    use_8bit_adam: bool = option(
        False, "Adam's two moments in 8 bits each, by bitsandbytes: 2 bytes per weight in place of 8."
    )
    sharding: Literal["none", "optimizer", "parameters"] = option(
        "none",
        "What several processes divide among them, to save memory (FSDP2). none: each has all. optimizer: gradients, "
        "optimizer state and moving average, at hardly more traffic (ZeRO-2). parameters: also the network's, which "
        "are gathered block by block as they are needed (ZeRO-3). Checkpoints are the same, so a run can go on with "
        "another choice.",
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.")
    cache_dir: str | None = option(
        None,
        "Where what is computed of the data once is stored; runs may share it, also at the same time. Default: "
        "`cache` in --output_dir.",
    )
    seed: int = option(0, "Decides on all randomness: same seed, same weights, however often a run was interrupted.")
    dataloader_num_workers: int = option(0, "Processes that read images.")
    checkpointing_steps: int = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: int = option(2, "Checkpoints kept, the newest.")
    resume: bool = option(False, "Go on from the newest checkpoint in --output_dir, or start if there is none.")
    force: bool = option(False, "Resume although data, base, seed or schedule are not those that the run began with.")
    validation_steps: int = option(500, "Steps between previews.")
    luminance_images: int = option(
        32,
        "Pictures that are painted with each preview, without guidance, for captions or classes drawn from the data, "
        "the same each time. Their mean luminance beside the data's shows when the conversion is done: a line on the "
        "terminal, luminance/p5, p95 and w1 in the logs, a histogram beside the preview, luminance.png over steps. "
        "Step 0 is the base as it came. 0 for none.",
    )
    num_inference_steps: int = option(30, "Sampling steps of the previews.")
    logging_steps: int = option(
        50,
        "Steps between logs of the loss by timestep, without weights: in ten bins (loss/t000-099, ...) and at the "
        "last timestep alone (loss/last), each a mean since the log before.",
    )
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (in output_dir/logs), wandb or another of accelerate's, which has to be installed; all "
        "that are; or none.",
    )
    push_to_hub: bool = option(
        False,
        "Upload the result to the Hub when it is whole on the disk, without checkpoints, caches and logs. Token and "
        "repo are checked before the first step; if the upload fails, the result stays and the command to repeat it "
        "is printed.",
    )
    hub_model_id: str | None = option(
        None, "Repo to push to, made if need be: owner/name, or a name. Default: that of --output_dir."
    )
    hub_private_repo: bool = option(False, "Make that repo a private one; one that exists stays as it is.")
    dry_run: bool = option(False, "Check everything, print the resolved configuration and the plan, and stop.")
    measure: bool = option(
        False,
        "With --dry_run: also time some steps, on noise if no data is named, and project the time of all.",
    )

    program: ClassVar[str]
    """What `--help` calls the command."""
    description: ClassVar[str]
    examples: ClassVar[str]
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of a recipe."""
    decides: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "train_data_dir", "train_shards", "shuffle_shards", "resolution", "seed"),
        *("prediction_type", "rescale_betas_zero_snr"),
        *("loss_weighting", "snr_gamma", "timestep_sampling", "noise_offset"),
    )
    """Options that a run cannot change on the way without becoming another run."""
    positive: ClassVar[tuple[str, ...]] = (
        *("resolution", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("max_grad_norm", "checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
        *("num_inference_steps", "logging_steps", "snr_gamma", "shuffle_shards"),
    )
    not_negative: ClassVar[tuple[str, ...]] = (
        *("lr_warmup_steps", "adam_weight_decay", "nan_skip", "dataloader_num_workers", "noise_offset"),
        "luminance_images",
    )
    shares: ClassVar[tuple[str, ...]] = ("ema_decay",)
    """Options in [0, 1]."""

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type, zero_terminal_snr=self.rescale_betas_zero_snr)
        if self.measure and not self.dry_run:
            raise ValueError("--measure trains nothing: pass --dry_run with it.")
        named = sum(map(bool, (self.dataset_name, self.train_data_dir, self.train_shards)))
        if named > 1 or not (named or self.measure):
            raise ValueError("Pass the data as one of --dataset_name, --train_data_dir and --train_shards.")
        if self.lr_warmup_steps is None:
            # Resolved here, so that it is written down: a run that goes on from its file keeps its warm-up.
            fits = self.max_train_steps > _WARMUP_STEPS
            self.lr_warmup_steps = _WARMUP_STEPS if fits else self.max_train_steps // 10
        for one in dataclasses.fields(self):
            choices, value = _choices(one.type), getattr(self, one.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{one.name}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}={value} must be above 0.")
        for name in self.not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}={getattr(self, name)} must not be negative.")
        for name in self.shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)} must lie in [0, 1].")
        self.check_schedule(zero_terminal_snr=self.rescale_betas_zero_snr)

    def check_schedule(self, zero_terminal_snr: bool) -> None:
        """Refuse what would leave the last timestep of zero SNR untrained, or not pure noise.

        Raises:
            ValueError: with the value and what to do instead.
        """
        check_loss_weighting(self.loss_weighting, zero_terminal_snr, self.snr_gamma)
        if self.noise_offset and zero_terminal_snr:
            raise ValueError(
                f"--noise_offset={self.noise_offset} cannot be used at zero terminal SNR: the last timestep would be "
                "noise of another distribution than N(0, I), from which sampling starts. Zero terminal SNR does what "
                "the offset is for: leave it out; to compare, pass --rescale_betas_zero_snr=False."
            )

    @property
    def has_data(self) -> bool:
        """Whether data is named; a measurement does without."""
        return bool(self.dataset_name or self.train_data_dir or self.train_shards)

    @property
    def cache_folder(self) -> Path:
        """Where what is computed of the data once is stored."""
        return Path(self.output_dir, "cache") if self.cache_dir is None else Path(self.cache_dir)

    def global_batch(self, processes: int) -> int:
        """Samples per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def to_yaml(self) -> str:
        """The configuration as the YAML that `--config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _choices(kind: Any) -> tuple[Any, ...]:
    """What a `Literal` option, or one that may also be None, can be; argparse checks the command line alone."""
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return get_args(literal)

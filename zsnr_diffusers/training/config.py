"""One dataclass per kind of run is the configuration, the command line and the YAML file."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from ..core import check_loss_weighting
from ..core.predictions import check_prediction_type

_WARMUP_STEPS = 500


class Range(NamedTuple):
    """What a number may be; None is in every range."""

    holds: Callable[[Any], bool]
    must: str


POSITIVE = Range(lambda value: value > 0, "must be above 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must not be negative")
SHARE = Range(lambda value: 0 <= value <= 1, "must lie in [0, 1]")

IDENTITY = "identity"
"""Of an option that a run cannot change on the way without becoming another run."""


def option(default: Any, text: str) -> Any:
    """A field with its default and what `--help` says of it; its type is annotated with its range, and `IDENTITY`."""
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
    dataset_name: Annotated[str | None, IDENTITY] = option(
        None, "Data set of the Hub, or anything `datasets.load_dataset` opens."
    )
    train_data_dir: Annotated[str | None, IDENTITY] = option(
        None,
        "Folder of images at any depth, instead of --dataset_name; layouts are below. A metadata.jsonl, .csv or "
        ".parquet in it, or in folders of it, describes its images: file_name, relative to itself, beside other "
        "columns. Of a folder that holds train/ beside test/ or validation/ and nothing else, train/ is used. Images "
        "that are left out are counted, and some of them named.",
    )
    train_shards: Annotated[str | None, IDENTITY] = option(
        None,
        "Tar shards in WebDataset's layout, instead of --dataset_name: s3://bucket/{0000..0127}.tar, /data/*.tar, or "
        "whatever fsspec opens. A sample is 0001.jpg beside 0001.txt or 0001.json. Rows are read by range, so no disk "
        "has to hold them; where they lie is found once by reading the tars' headers, and stored in --cache_dir. "
        "Images are not checked before the start: --on_bad_image counts when one comes up.",
    )
    shuffle_shards: Annotated[int, POSITIVE, IDENTITY] = option(
        16,
        "Shards whose rows are shuffled together: each epoch takes all shards in another order, as many at a time. "
        "More mix better, fewer are kinder to caches between here and the data. Rows of one shard should be mixed "
        "already.",
    )
    image_column: str = option("image", "Column of the images.")
    resolution: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Pixels per side; images are resized and centre-cropped. Default: the model's.",
    )
    random_flip: bool = option(False, "Mirror half of the images.")
    on_bad_image: Literal["fail", "skip"] = option(
        "fail",
        "What to do about images that cannot be read: stop before training, or leave them out. Both name them. Those "
        "of --train_shards are met on the way: fail ends with a checkpoint to go on from, skip shows the next row.",
    )
    prediction_type: Annotated[str, IDENTITY] = option(
        "v_prediction",
        "What the UNet learns: v_prediction, or epsilon or sample to compare.",
    )
    rescale_betas_zero_snr: Annotated[bool, IDENTITY] = option(
        True,
        "Train on zero terminal SNR. False keeps the schedule as it is, to compare.",
    )
    loss_weighting: Annotated[
        Literal["constant", "min_snr_floored", "soft_min_snr_floored", "learned_uncertainty", "min_snr"], IDENTITY
    ] = option(
        "constant",
        "Weight of each timestep in the loss. constant: 1 (the paper). min_snr_floored, soft_min_snr_floored: less "
        "for timesteps of little noise, and still 1 for the last one under v-loss. learned_uncertainty: each loss "
        "over its expected size, learned on the way (EDM2); what is then logged as loss may be negative. min_snr: "
        "refused on zero terminal SNR, where the last timestep would have weight 0 and stay untrained.",
    )
    snr_gamma: Annotated[float, POSITIVE, IDENTITY] = option(
        5.0, "SNR above which timesteps weigh less in the min_snr weightings."
    )
    timestep_sampling: Annotated[Literal["uniform", "stratified", "antithetic"], IDENTITY] = option(
        "uniform",
        "How timesteps are drawn; each is uniform over all of them. uniform: independently. stratified: one from "
        "each part of an even division, over the global batch of a step. antithetic: in pairs t and T - 1 - t. The "
        "last two make the loss of a step vary less.",
    )
    noise_offset: Annotated[float, NOT_NEGATIVE, IDENTITY] = option(
        0.0,
        "Standard deviation of noise that each channel gets as a whole, to compare: another remedy for images of "
        "medium brightness, refused on zero terminal SNR, which replaces it: there the last timestep must be N(0, I).",
    )
    max_train_steps: Annotated[int, POSITIVE] = option(10_000, "Optimizer steps.")
    train_batch_size: Annotated[int, POSITIVE] = option(8, "Images per process and forward pass.")
    gradient_accumulation_steps: Annotated[int, POSITIVE] = option(1, "Forward passes per optimizer step.")
    learning_rate: Annotated[float, POSITIVE] = option(1e-5, "AdamW's learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = option("constant_with_warmup", "Schedule of the learning rate, as in diffusers.")
    lr_warmup_steps: Annotated[int | None, NOT_NEGATIVE] = option(
        None,
        "Steps over which the learning rate rises from 0, if its schedule has a warm-up. Default: 500, or a tenth of "
        "--max_train_steps in a run of up to 500.",
    )
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(1e-2, "AdamW's weight decay; with 0 it is Adam.")
    max_grad_norm: Annotated[float, POSITIVE] = option(1.0, "Gradients are clipped to this norm.")
    nan_skip: Annotated[int, NOT_NEGATIVE] = option(
        0,
        "How many steps in a row may be left out because the loss or the gradients are NaN or infinite.",
    )
    ema_decay: Annotated[float, SHARE] = option(
        0.9999,
        "Decay of the moving average of the weights, which is what is saved; 0 for none.",
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
    seed: Annotated[int, IDENTITY] = option(
        0, "Decides on all randomness: same seed, same weights, however often a run was interrupted."
    )
    dataloader_num_workers: Annotated[int, NOT_NEGATIVE] = option(0, "Processes that read images.")
    checkpointing_steps: Annotated[int, POSITIVE] = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: Annotated[int, POSITIVE] = option(2, "Checkpoints kept, the newest.")
    resume: bool = option(False, "Go on from the newest checkpoint in --output_dir, or start if there is none.")
    force: bool = option(False, "Resume although data, base, seed or schedule are not those that the run began with.")
    validation_steps: Annotated[int, POSITIVE] = option(500, "Steps between previews.")
    luminance_images: Annotated[int, NOT_NEGATIVE] = option(
        32,
        "Images that are generated with each preview, without guidance, for captions or classes drawn from the data, "
        "the same each time. Their mean luminance beside the data's shows when the conversion is done: a line on the "
        "terminal, luminance/p5, p95 and w1 in the logs, a histogram beside the preview, luminance.png over steps. "
        "Step 0 is the base as it came. 0 for none.",
    )
    num_inference_steps: Annotated[int, POSITIVE] = option(30, "Sampling steps of the previews.")
    logging_steps: Annotated[int, POSITIVE] = option(
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
    """Options that a run cannot change on the way without becoming another run."""
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
        kinds = get_type_hints(type(self), include_extras=True)
        for one in dataclasses.fields(self):
            _check(one.name, kinds[one.name], getattr(self, one.name))
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

    @classmethod
    def identity(cls) -> list[str]:
        """Options that a run cannot change on the way without becoming another run."""
        hints = get_type_hints(cls, include_extras=True)
        return [name for name, kind in hints.items() if IDENTITY in getattr(kind, "__metadata__", ())]

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


def _check(name: str, kind: Any, value: Any) -> None:
    """Refuse what an option cannot be."""
    if value is None:
        return
    if (choices := _choices(kind)) and value not in choices:
        raise ValueError(f"--{name}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")
    for limit in getattr(kind, "__metadata__", ()):
        if isinstance(limit, Range) and not limit.holds(value):
            raise ValueError(f"--{name}={value} {limit.must}.")


def _choices(kind: Any) -> tuple[Any, ...]:
    """What a `Literal` option can be, or one that may also be None; argparse checks the command line alone."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(_choices, get_args(kind))), ()) if get_origin(kind) is not None else ()

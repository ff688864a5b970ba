"""What a step of a run is: its objective, its update of the weights, and how it is computed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ...core import check_loss_weighting
from ...core.predictions import check_prediction_type
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, SHARE, Options, option

_WARMUP_STEPS = 500


@dataclass
class ObjectiveConfig(Options):
    """What the network learns: prediction, schedule, weights of timesteps."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prediction_type(self.prediction_type, zero_terminal_snr=self.rescale_betas_zero_snr)
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

    def loss_in_words(self) -> str:
        """The loss as a model card has it."""
        weight = "weight 1 at every timestep"
        if self.loss_weighting != "constant":
            gamma = f" with gamma {self.snr_gamma:g}" if "min_snr" in self.loss_weighting else ""
            weight = f"weights `{self.loss_weighting}`{gamma}"
        offset = f", noise offset {self.noise_offset:g}" if self.noise_offset else ""
        return f"mean squared error of `{self.prediction_type}`, {weight}{offset}"


@dataclass
class OptimizationConfig(Options):
    """How the weights change: steps, batches, learning rate, optimizer, moving average."""

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
    use_8bit_adam: bool = option(
        False, "Adam's two moments in 8 bits each, by bitsandbytes: 2 bytes per weight in place of 8."
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps is None:
            # Resolved here, so that it is written down: a run that goes on from its file keeps its warm-up.
            fits = self.max_train_steps > _WARMUP_STEPS
            self.lr_warmup_steps = _WARMUP_STEPS if fits else self.max_train_steps // 10

    def global_batch(self, processes: int) -> int:
        """Samples per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def checkpoint_bytes(self, parameters: int) -> int:
        """Size of a checkpoint of so many trained parameters.

        They, their moving average and Adam's two moments, in float32 or 8 bits.
        """
        return parameters * (4 * (1 + (self.ema_decay > 0)) + 2 * (1 if self.use_8bit_adam else 4))


@dataclass
class ComputeConfig(Options):
    """How steps are computed: precision, memory, compilation, processes."""

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
    sharding: Literal["none", "optimizer", "parameters"] = option(
        "none",
        "What several processes divide among them, to save memory (FSDP2). none: each has all. optimizer: gradients, "
        "optimizer state and moving average, at hardly more traffic (ZeRO-2). parameters: also the network's, which "
        "are gathered block by block as they are needed (ZeRO-3). Checkpoints are the same, so a run can go on with "
        "another choice.",
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.")

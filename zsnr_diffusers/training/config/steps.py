"""What a step of a run is: its update of the weights, and how it is computed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .options import NOT_NEGATIVE, POSITIVE, SHARE, Options, option

_WARMUP_STEPS = 500


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
    ema_update_interval: Annotated[int, POSITIVE] = option(
        1,
        "Steps between updates of the moving average, each by the decay of all steps since the last; what is saved "
        "may lack the last few.",
    )
    ema_device: Literal["accelerator", "cpu"] = option(
        "accelerator",
        "Where the moving average is. cpu: in the host's memory, which saves the GPU 4 bytes per trained weight; each "
        "update then waits for a copy of the weights, so pass --ema_update_interval, of 50 or so.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps is None:
            # Resolved here, so that it is written down: a run that continues from its file keeps its warm-up.
            fits = self.max_train_steps > _WARMUP_STEPS
            self.lr_warmup_steps = _WARMUP_STEPS if fits else self.max_train_steps // 10

    def global_batch(self, processes: int) -> int:
        """Samples per optimizer step, over all processes and accumulated forward passes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def checkpoint_bytes(self, parameters: int) -> int:
        """Size of a checkpoint in bytes for this number of trained parameters.

        They, their moving average and Adam's two moments, in float32 or 8 bits.
        """
        return parameters * (4 * (1 + (self.ema_decay > 0)) + 2 * (1 if self.use_8bit_adam else 4))


@dataclass
class ComputeConfig(Options):
    """How steps are computed: precision, memory, compilation, processes."""

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "Arithmetic of the forward pass; the weights stay float32. auto: on a GPU bf16, or fp16 if it has no bf16; on "
        "a CPU bf16 if a trial of a second finds it faster. What it found is written down, and kept on --resume; "
        "another machine may find something else, so the same seed then gives other weights. Default: what accelerate "
        "is configured for.",
    )
    allow_tf32: bool = option(
        False,
        "Let matrix products in float32 round their factors to TF32 on GPUs that have it (Ampere and later). Off as "
        "in torch; under bf16 or fp16 there is little left that it could speed up. Convolutions use it anyway.",
    )
    channels_last: bool = option(
        False, "Keep weights in the memory layout that convolutions on tensor cores want; files have the usual one."
    )
    compile: Literal["auto", "none", "blocks", "network"] = option(
        "auto",
        "torch.compile, which takes minutes before the first step. blocks: the transformer blocks, once for all of a "
        "kind. network: all of it. auto: blocks on an NVIDIA or AMD GPU in runs of 1,000 steps or more, if the "
        "compiler works there and --sharding is none; else none.",
    )
    sharding: Literal["none", "optimizer", "parameters"] = option(
        "none",
        "What several processes divide among them, to save memory (FSDP2). none: each has all. optimizer: gradients, "
        "optimizer state and moving average, at hardly more traffic (ZeRO-2); gradients of accumulated passes are "
        "whole until the last. parameters: also the network's, which are gathered block by block as they are needed, "
        "and gradients after each pass (ZeRO-3). Under bf16, parameters are gathered in it, norms among them. "
        "Checkpoints are the same, so a run can continue with another choice.",
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.")
    async_checkpointing: bool = option(
        True,
        "Write checkpoints while training goes on, from a copy of the state in the memory of the main process's host, "
        "which takes as much as a checkpoint on the disk. False, or where so much is not free: training waits.",
    )

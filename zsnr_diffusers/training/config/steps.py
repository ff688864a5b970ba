"""Options of a training step: weight updates and computation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .options import NOT_NEGATIVE, POSITIVE, SHARE, Options, option

_WARMUP_STEPS = 500


@dataclass
class OptimizationConfig(Options):
    """Weight updates: steps, batches, learning rate, optimizer, EMA."""

    max_train_steps: Annotated[int, POSITIVE] = option(10_000, "Optimizer steps.")
    train_batch_size: Annotated[int, POSITIVE] = option(8, "Images per process and forward pass.")
    gradient_accumulation_steps: Annotated[int, POSITIVE] = option(1, "Forward passes per optimizer step.")
    learning_rate: Annotated[float, POSITIVE] = option(1e-5, "AdamW's learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = option("constant_with_warmup", "Learning rate schedule, as in diffusers.")
    lr_warmup_steps: Annotated[int | None, NOT_NEGATIVE] = option(
        None,
        "Steps over which the learning rate increases from 0, if its schedule has a warmup. Default: 500, or a tenth "
        "of --max_train_steps in a run of up to 500.",
    )
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(1e-2, "AdamW's weight decay; 0 gives Adam.")
    use_8bit_adam: bool = option(
        False, "Store Adam's two moments in 8 bits each, with bitsandbytes: 2 bytes per weight instead of 8."
    )
    max_grad_norm: Annotated[float, POSITIVE] = option(1.0, "Gradients are clipped to this norm.")
    nan_skip: Annotated[int, NOT_NEGATIVE] = option(
        0,
        "How many consecutive steps may be skipped because the loss or the gradients are NaN or infinite.",
    )
    ema_decay: Annotated[float, SHARE] = option(
        0.9999,
        "Decay of the EMA of the weights, which is saved as the result; 0 for none.",
    )
    ema_warmup: bool = option(
        True,
        "Increase the EMA decay gradually to its value, so that the initial weights are forgotten quickly. False: "
        "constant.",
    )
    ema_update_interval: Annotated[int, POSITIVE] = option(
        1,
        "Steps between EMA updates, each with the decay of all steps since the last; the result may not include the "
        "last few steps.",
    )
    ema_device: Literal["accelerator", "cpu"] = option(
        "accelerator",
        "Device of the EMA. cpu: in host memory, which saves 4 bytes of GPU memory per trained weight; each update "
        "then waits for a copy of the weights, so also pass --ema_update_interval, about 50.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps is None:
            # Resolved here, so that it is saved: a run resumed from its file keeps its warmup.
            fits = self.max_train_steps > _WARMUP_STEPS
            self.lr_warmup_steps = _WARMUP_STEPS if fits else self.max_train_steps // 10

    def global_batch(self, processes: int) -> int:
        """Samples per optimizer step, over all processes and accumulated forward passes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def checkpoint_bytes(self, parameters: int) -> int:
        """Size of a checkpoint in bytes for this number of trained parameters.

        Includes their EMA and Adam's two moments, in float32 or 8 bits.
        """
        return parameters * (4 * (1 + (self.ema_decay > 0)) + 2 * (1 if self.use_8bit_adam else 4))


@dataclass
class ComputeConfig(Options):
    """How steps are computed: precision, memory, compilation, processes."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the forward pass; the weights stay float32. Default: accelerate's configuration."
    )
    allow_tf32: bool = option(
        False,
        "Allow TF32 for float32 matrix products on GPUs that support it (Ampere and later). Off by default, as in "
        "torch; with bf16 or fp16 it has little effect. Convolutions use it anyway.",
    )
    channels_last: bool = option(
        False, "Keep weights in the memory layout for convolutions on tensor cores; saved files have the usual layout."
    )
    compile: Literal["none", "blocks", "network"] = option(
        "none",
        "Use torch.compile, which takes minutes before the first step. blocks: compile the transformer blocks, once "
        "per kind. network: compile the complete network.",
    )
    sharding: Literal["none", "optimizer", "parameters"] = option(
        "none",
        "What to shard over processes to save memory (FSDP2). none: nothing. optimizer: gradients, optimizer state "
        "and EMA, with little additional communication (ZeRO-2); gradients of accumulated passes are not sharded "
        "until the last. parameters: also the parameters, which are gathered block by block when needed, and "
        "gradients after each pass (ZeRO-3). With bf16, parameters including norms are gathered in bf16. Checkpoints "
        "are identical, so a run can be resumed with another choice. Default: accelerate's FSDP2 settings, or "
        "none.",
    )
    dp_replicate_size: Annotated[int, POSITIVE] = option(
        1,
        "With --sharding, number of groups of processes that have a copy each, sharded within the group (hybrid "
        "sharding, HSDP). With one group per machine, only gradients are communicated between machines.",
    )
    fsdp_offload_params: bool = option(
        False,
        "With --sharding, keep the shards in host memory, where the optimizer then computes; weights are copied to "
        "the GPU layer by layer. Slow; use it only if memory is short otherwise.",
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.")
    async_checkpointing: bool = option(
        True,
        "Write checkpoints while training continues, from a copy of the state in the main process's host memory, "
        "which needs as much memory as the checkpoint's size. False, or without enough free memory: training waits.",
    )

    def shards_over(self, processes: int) -> int:
        """How many processes share one copy of what is trained; 0 if nothing is sharded.

        Offloading shards over one process too.
        """
        shards = self.sharding != "none" and (processes > 1 or self.fsdp_offload_params)
        return processes // self.dp_replicate_size if shards else 0

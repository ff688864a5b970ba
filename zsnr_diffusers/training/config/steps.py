"""Options of a training step: weight updates and computation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, SHARE, Options, option

_WARMUP_STEPS = 500
_LEAST_OF_PRODIGY = 0.01
"""Learning rate; what is smaller was meant for another optimizer."""


@dataclass
class OptimizationConfig(Options):
    """Weight updates: steps, batches, learning rate, optimizer, EMA."""

    max_train_steps: Annotated[int, POSITIVE] = option(10_000, "Optimizer steps.")
    train_batch_size: Annotated[int, POSITIVE] = option(8, "Images per process and forward pass.")
    gradient_accumulation_steps: Annotated[int, POSITIVE] = option(1, "Forward passes per optimizer step.")
    learning_rate: Annotated[float, POSITIVE] = option(1e-5, "Learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = option("constant_with_warmup", "Learning rate schedule, as in diffusers.")
    lr_warmup_steps: Annotated[int | None, NOT_NEGATIVE] = option(
        None,
        "Steps over which the learning rate increases from 0, if its schedule has a warmup. Default: 500, or a tenth "
        "of --max_train_steps in a run of up to 500.",
    )
    optimizer: Annotated[Literal["adamw", "adafactor", "lion", "prodigy"], IDENTITY] = option(
        "adamw",
        "adamw: torch's. adafactor, transformers': no moments, of each matrix only mean squares of rows and columns, "
        "and steps that are not relative to the weights; learning rates as AdamW's. lion, bitsandbytes': one moment; "
        "a third to a tenth of AdamW's learning rate. prodigy, prodigyopt's: finds its step size itself; pass "
        "--learning_rate 1.",
    )
    adam_beta1: Annotated[float, SHARE] = option(0.9, "Decay of the mean gradient, of all but adafactor.")
    adam_beta2: Annotated[float | None, SHARE] = option(
        None, "Decay of the mean squared gradient, or of lion's moment. Default: 0.999, of lion 0.99."
    )
    adam_epsilon: Annotated[float, POSITIVE] = option(1e-8, "Added to the root of that of adamw and prodigy.")
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(
        1e-2, "Weight decay, of all optimizers; with 0 AdamW is Adam."
    )
    use_8bit_adam: bool = option(
        False, "AdamW's two moments in 8 bits each, by bitsandbytes: 2 bytes per weight instead of 8."
    )
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = option(1.0, "Gradients are clipped to this norm; 0: they are not.")
    full_bf16: bool = option(
        False,
        "Keep the weights themselves in bfloat16, and gradients with them: 4 bytes per weight instead of 8. Updates "
        "are computed in float32 and rounded at random, up or down in proportion to the distance, since those of "
        "fine-tuning are smaller than half of bfloat16's last digit and would be lost. With --mixed_precision bf16 "
        "and --ema_decay 0.",
    )
    fused_backward_pass: bool = option(
        False,
        "Update each weight as soon as its gradient is there, in the backward pass, and forget the gradient: so there "
        "is never more than one, but their common norm is not known before. For one process, with --max_grad_norm 0 "
        "and without accumulation.",
    )
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
        self._check_optimizer()
        self._check_memory()

    def _check_optimizer(self) -> None:
        """Refuse settings that an optimizer does not have.

        Raises:
            ValueError: with the value and the remedy.
        """
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError(f"--use_8bit_adam is of adamw, and --optimizer={self.optimizer}: leave out one of them.")
        if self.optimizer == "prodigy" and self.learning_rate < _LEAST_OF_PRODIGY:
            raise ValueError(
                f"--optimizer=prodigy finds its step size itself and multiplies it by --learning_rate, which is "
                f"{self.learning_rate:g}: pass --learning_rate 1."
            )

    def _check_memory(self) -> None:
        """Refuse what does not go with weights in bfloat16, or with updates in the backward pass.

        Raises:
            ValueError: with the options and the remedy.
        """
        if self.full_bf16 and self.ema_decay:
            raise ValueError(
                f"--full_bf16 and --ema_decay={self.ema_decay:g}: in bfloat16 an average would not move; pass "
                "--ema_decay 0."
            )
        if self.fused_backward_pass:
            self._check_fused_backward_pass()
        if self.optimizer == "prodigy" and (self.full_bf16 or self.fused_backward_pass):
            option = "full_bf16" if self.full_bf16 else "fused_backward_pass"
            raise ValueError(
                f"--{option} updates weights one by one, and --optimizer=prodigy all of them together: take "
                "adafactor, adamw or lion."
            )

    def _check_fused_backward_pass(self) -> None:
        """Refuse what needs all gradients at once.

        Raises:
            ValueError: with the option and the remedy.
        """
        if self.max_grad_norm:
            raise ValueError(
                f"--fused_backward_pass updates weights before the norm of all gradients is known, and "
                f"--max_grad_norm={self.max_grad_norm:g}: pass --max_grad_norm 0."
            )
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--fused_backward_pass updates weights in every pass, and --gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: pass 1 with a larger --train_batch_size."
            )

    def global_batch(self, processes: int) -> int:
        """Samples per optimizer step, over all processes and accumulated forward passes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


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
        "Allow TF32 for float32 matrix products on GPUs that support it (Ampere and later). Off by default, as in "
        "torch; with bf16 or fp16 it has little effect. Convolutions use it anyway.",
    )
    channels_last: bool = option(
        False, "Keep weights in the memory layout for convolutions on tensor cores; saved files have the usual layout."
    )
    compile: Literal["auto", "none", "blocks", "network"] = option(
        "auto",
        "torch.compile, which takes minutes before the first step. blocks: the transformer blocks, once for all of a "
        "kind. network: all of it. auto: blocks on an NVIDIA or AMD GPU in runs of 1,000 steps or more, if the "
        "compiler works there and --sharding is none; else none.",
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

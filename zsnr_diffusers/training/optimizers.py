"""The optimizers that a run can choose from, each from the library that keeps it, and weights in bfloat16."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from .config import NetworkConfig, OptimizationConfig

Groups = Iterable[dict[str, Any]]

_QUANTIZED_FROM, _BLOCK = 4096, 256
"""bitsandbytes keeps smaller tensors in float32, and a factor for each block of larger ones."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer: who makes it, and what it remembers.

    Attributes:
        create: from groups of parameters, a configuration and the device.
        state_bytes: of a parameter of a shape.
        library: required in addition to the training's own.
        group_values: what it remembers of a group of parameters, numbers that a run has to keep.
    """

    create: Callable[[Groups, OptimizationConfig, torch.device], torch.optim.Optimizer]
    state_bytes: Callable[[Sequence[int]], int]
    library: str | None = None
    group_values: tuple[str, ...] = ()


def _adam_settings(config: OptimizationConfig, beta2: float = 0.999) -> dict[str, Any]:
    """Settings that all optimizers with moments have."""
    betas = config.adam_beta1, beta2 if config.adam_beta2 is None else config.adam_beta2
    return {"lr": config.learning_rate, "betas": betas, "weight_decay": config.adam_weight_decay}


def _create_adamw(groups: Groups, config: OptimizationConfig, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type in _get_fused_kernels_supported_devices()
    return torch.optim.AdamW(groups, **_adam_settings(config), eps=config.adam_epsilon, fused=fused)


def _create_adamw_8bit(groups: Groups, config: OptimizationConfig, device: torch.device) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, **_adam_settings(config), eps=config.adam_epsilon
    )
    return optimizer


def _create_adafactor(groups: Groups, config: OptimizationConfig, device: torch.device) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups,
        lr=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    return optimizer


def _create_lion(groups: Groups, config: OptimizationConfig, device: torch.device) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.Lion(groups, **_adam_settings(config, beta2=0.99))
    return optimizer


def _create_prodigy(groups: Groups, config: OptimizationConfig, device: torch.device) -> torch.optim.Optimizer:
    import prodigyopt

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
        optimizer: torch.optim.Optimizer = prodigyopt.Prodigy(
            groups,
            **_adam_settings(config),
            eps=config.adam_epsilon,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    return optimizer


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _adamw_8bit_bytes(shape: Sequence[int]) -> int:
    count = _count(shape)
    return 2 * (count + 4 * -(-count // _BLOCK)) if count >= _QUANTIZED_FROM else 8 * count + 4


def _adafactor_bytes(shape: Sequence[int]) -> int:
    """Mean squares over the last and over the last but one dimension, and the size of the weights."""
    count = _count(shape)
    return 4 * (1 + (count if len(shape) < 2 else count // shape[-1] + count // shape[-2]))


OPTIMIZERS = {
    "adamw": OptimizerKind(_create_adamw, lambda shape: 8 * _count(shape) + 4),
    "adamw_8bit": OptimizerKind(_create_adamw_8bit, _adamw_8bit_bytes, "bitsandbytes"),
    "adafactor": OptimizerKind(_create_adafactor, _adafactor_bytes),
    "lion": OptimizerKind(_create_lion, lambda shape: 4 * _count(shape), "bitsandbytes"),
    "prodigy": OptimizerKind(
        _create_prodigy, lambda shape: 16 * _count(shape), "prodigyopt", ("d", "d_max", "d_numerator", "k")
    ),
}
"""By the name of `--optimizer`."""


def optimizer_kind(config: OptimizationConfig) -> OptimizerKind:
    """The optimizer of a configuration."""
    return OPTIMIZERS["adamw_8bit" if config.use_8bit_adam else config.optimizer]


def checkpoint_bytes(config: OptimizationConfig, shapes: Iterable[Sequence[int]]) -> int:
    """Size of a checkpoint of parameters of these shapes, with their EMA and the optimizer's state."""
    each, state_bytes = (2 if config.full_bf16 else 4) + 4 * (config.ema_decay > 0), optimizer_kind(config).state_bytes
    return sum(each * _count(shape) + state_bytes(shape) for shape in shapes)


def check_optimizer(config: NetworkConfig) -> None:
    """Refuse an optimizer whose library is missing, or that does not go with how a network is computed.

    Raises:
        ValueError: with the options, or the library that is missing.
    """
    name = "use_8bit_adam" if config.use_8bit_adam else f"optimizer={config.optimizer}"
    library = optimizer_kind(config).library
    if library is not None and find_spec(library) is None:
        raise ValueError(f"--{name} needs {library}: python -m pip install {library}")
    if library == "bitsandbytes" and config.channels_last:
        raise ValueError(f"--{name} and --channels_last are not compatible: it knows contiguous tensors alone.")
    not_divided = [name] if config.optimizer != "adamw" or config.use_8bit_adam else []
    not_divided += [one for one in ("full_bf16", "fused_backward_pass") if getattr(config, one)]
    if config.sharding != "none" and not_divided:
        raise ValueError(f"--{not_divided[0]} and --sharding={config.sharding} are not compatible: leave out one.")


def check_updates(config: OptimizationConfig, accelerator: Accelerator) -> None:
    """Refuse ways to update weights that precision or number of processes do not allow.

    Raises:
        ValueError: with the option and the remedy.
    """
    precision, processes = accelerator.mixed_precision, accelerator.num_processes
    if config.full_bf16 and precision != "bf16":
        raise ValueError(f"--full_bf16 and --mixed_precision={precision} are not compatible: pass bf16.")
    if config.fused_backward_pass and precision == "fp16":
        raise ValueError("--fused_backward_pass and --mixed_precision=fp16 are not compatible: pass bf16 or no.")
    if config.fused_backward_pass and processes > 1:
        raise ValueError(
            f"--fused_backward_pass updates weights before {processes} processes have shared their gradients: train "
            "in one, or leave it out."
        )


def round_stochastically_(target: Tensor, value: Tensor, draw: torch.Generator) -> None:
    """Round a float32 tensor to bfloat16, into `target`, up or down in proportion to the distance.

    Its expectation is the value itself. bfloat16 is the upper half of float32, so a random number is added to the
    lower half, which is then cut off (Zamirai et al. 2020, arXiv:2010.06192).

    Args:
        target: bfloat16.
        value: float32, same shape and strides.
        draw: on the device of both.
    """
    noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, generator=draw, device=value.device)
    rounded = (value.view(torch.int32) + noise) & -(1 << 16)
    target.copy_(rounded.view(torch.float32))

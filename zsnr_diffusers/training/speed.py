"""Options that make steps faster or save memory without changing the result, up to rounding."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .config import ComputeConfig, NetworkConfig

BACKEND = "inductor"
"""Of torch.compile."""


def check_speed(config: NetworkConfig) -> None:
    """Refuse speed options that do not work together.

    Raises:
        ValueError: with the options.
    """
    if config.sharding == "none" and (config.dp_replicate_size > 1 or config.fsdp_offload_params):
        raise ValueError("--dp_replicate_size and --fsdp_offload_params need --sharding, of optimizer or parameters.")
    if config.ema_device == "cpu" and config.sharding != "none":
        raise ValueError("--ema_device=cpu and --sharding are not compatible, since sharding divides the EMA too.")
    if config.compile not in ("auto", "none") and config.sharding != "none":
        raise ValueError(f"--compile={config.compile} and --sharding={config.sharding} are not compatible.")


def prepare_memory_and_compile(unet: Any, config: ComputeConfig) -> None:
    """Set a UNet's memory format and compilation, in place, so that names and parameters do not change.

    It is compiled in its first forward pass; `auto` is to be resolved before.

    Raises:
        ValueError: blocks are to be compiled, and diffusers names none for this kind of network.
    """
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.compile == "network":
        unet.compile(backend=BACKEND)
    elif config.compile == "blocks":
        try:
            unet.compile_repeated_blocks(backend=BACKEND)
        except ValueError as error:
            raise ValueError(f"--compile=blocks: {error} Use network or none.") from error


def no_compile(config: ComputeConfig) -> contextlib.AbstractContextManager[Any]:
    """Context in which a compiled UNet runs eagerly, for few calls of other sizes in evaluation mode."""
    if config.compile == "none":
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def matmul_precision(allow_tf32: bool) -> Iterator[None]:
    """Context that lets float32 matrix products use TF32, and restores the process's setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allow_tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_with_strides_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor in the memory layout of `like`, as fused optimizer kernels require of a parameter's state."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor.clone()

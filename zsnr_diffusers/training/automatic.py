"""Options whose value is `auto`: what they are on this machine, found out before the first step."""

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ComputeConfig, NetworkConfig
from .speed import BACKEND

_LEAST_STEPS = 1000
"""Of a run that earns back the minutes of a compiler."""
_FASTER = 1.1
"""Times as fast as float32 bfloat16 must be on a CPU, whose timings vary by some percent."""
_TRIALS = 5

Compute = TypeVar("Compute", bound=ComputeConfig)
Network = TypeVar("Network", bound=NetworkConfig)


def resolve_mixed_precision(config: Compute, recorded: Mapping[str, Any]) -> Compute:
    """A configuration whose `mixed_precision` is no longer `auto`.

    A run that is resumed keeps what it began with, since a trial may end otherwise the next time.

    Args:
        config: of the run.
        recorded: its options as they were written down, by name; empty for a new one.

    Raises:
        ValueError: several processes train on CPUs, and each could choose by itself.
    """
    if config.mixed_precision != "auto":
        return config
    before = recorded.get("mixed_precision")
    chosen: Any = before if before in ("no", "bf16", "fp16") else _fastest_precision()
    return dataclasses.replace(config, mixed_precision=chosen)


def resolve_compile(config: Network, unet: Any, device: torch.device) -> Network:
    """A configuration whose `compile` is no longer `auto`.

    Args:
        config: of the run.
        unet: that it trains.
        device: that it trains on.
    """
    if config.compile != "auto":
        return config
    pays = device.type == "cuda" and config.max_train_steps >= _LEAST_STEPS and config.sharding == "none"
    blocks = pays and bool(getattr(unet, "_repeated_blocks", None)) and _compiler_works(device)
    return dataclasses.replace(config, compile="blocks" if blocks else "none")


def _fastest_precision() -> str:
    """The precision in which this machine trains fastest without harm to what is learned."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.backends.mps.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "no"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "--mixed_precision=auto is a trial on CPUs, and several processes could choose differently: pass bf16 or "
            "no."
        )
    return "bf16" if bfloat16_speedup() > _FASTER else "no"


def bfloat16_speedup() -> float:
    """How many times as fast as in float32 a small residual block with a linear layer is trained in bfloat16 here."""
    block = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    layer, x = nn.Linear(64, 256), torch.ones(4, 64, 32, 32)

    def seconds(half: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = block(x)
            output = F.silu(layer(hidden.flatten(2).transpose(1, 2)))
        torch.autograd.backward(output.float().mean())
        return time.perf_counter() - started

    seconds(False), seconds(True)  # the first time, kernels are made
    ratios = [seconds(False) / seconds(True) for _ in range(_TRIALS)]
    return statistics.median(ratios)


def _activation(x: Tensor) -> Tensor:
    """A kernel to try; torch 2.6 compiles no function of its own by itself."""
    return F.silu(x)


def _compiler_works(device: torch.device) -> bool:
    """Whether torch.compile makes a kernel on a device: it needs Triton and a C compiler, which may be missing."""
    try:
        torch.compile(_activation, backend=BACKEND)(torch.ones(8, device=device))
    except Exception:  # whatever it is, training works without
        return False
    finally:
        torch.compiler.reset()
    return True

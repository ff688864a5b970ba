"""Shard a network's parameters, gradients and optimizer state over processes (FSDP2).

Checkpoints contain full tensors, so a run can be resumed with other sharding, or without.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpointing.checkpoint import Tensors
from .config import ComputeConfig

CAN_SHARD_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Attribute that torch's `fully_shard` expects of every device, which is wrong in 2.6."""


SHARDED_LAYERS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Layers that are gathered separately: the innermost ones that diffusers declares unsplittable."""


def apply_fsdp(
    unet: Any, config: ComputeConfig, device: torch.device, processes: int, half: torch.dtype | None = None
) -> None:
    """Shard a UNet's parameters over processes by FSDP2, in place; layers are gathered one by one as they compute.

    Under `sharding="optimizer"` each layer is gathered once per step, not again for the backward pass. Gradients and
    optimizer state are still divided, as in ZeRO-2 (Rajbhandari et al. 2020, arXiv:1910.02054).

    Args:
        unet: a UNet2DModel or UNet2DConditionModel, on any device.
        config: with sharding, the number of copies, and where the shares are.
        device: of this process.
        processes: how many there are.
        half: dtype to gather parameters in, that of mixed precision; gradients are summed in float32 anyway.
    """
    unet.to(device)
    # Inputs are not cast: bfloat16 cannot represent fractional timesteps. autocast casts the others.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if config.fsdp_offload_params else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": _device_mesh(device, processes, config.dp_replicate_size),
        "reshard_after_forward": config.sharding == "parameters",
        "mp_policy": policy,
        "offload_policy": offload,
    }
    layers = [layer for layer in unet.modules() if type(layer).__name__ in SHARDED_LAYERS]
    for part in (*layers, *unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        if part is not None:
            fully_shard(part, **settings)


def _device_mesh(device: torch.device, processes: int, copies: int) -> DeviceMesh:
    """All processes in a row, or neighbors in rows of which each has a copy, named as accelerate does."""
    if copies == 1:
        return init_device_mesh(device.type, (processes,))
    return init_device_mesh(device.type, (copies, processes // copies), mesh_dim_names=("dp_replicate", "dp_shard"))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a possibly sharded one; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_tensors(tensors: Tensors, keep: bool) -> Tensors:
    """Gather sharded tensors on the CPU, others unchanged; collective.

    Args:
        tensors: by file and name.
        keep: whether this process needs them; others get nothing, to save memory.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for file, values in tensors.items():
        found[file] = {}
        for name, value in values.items():
            one = full_tensor(value)
            if keep:
                found[file][name] = one.cpu() if isinstance(value, DTensor) else one
    return found


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, if FSDP sharded `like`, else the tensor itself; collective."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # It goes to others by way of the device, also where the shares are kept on the host.
        return distribute_tensor(tensor, like.device_mesh, like.placements).to(like.device)
    return tensor


def distribute_all_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`distribute_like` by name; tensors without a counterpart stay full."""
    return {name: distribute_like(value, like[name]) if name in like else value for name, value in tensors.items()}


def full_model(unet: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """An unsharded copy of a network that FSDP sharded, with these full tensors, in evaluation mode."""
    with torch.device("meta"):
        network = type(unet).from_config(unet.config)
    network.load_state_dict({name: value.to(device) for name, value in tensors.items()}, assign=True)
    return network.eval()

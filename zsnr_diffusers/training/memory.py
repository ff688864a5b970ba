"""Estimate the device memory of a run from shapes only, without weights or computation.

torch's fake tensors go through the forward pass of a step, and the tensors saved for the backward pass are counted.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .config import NetworkConfig
from .fsdp import SHARDED_LAYERS
from .optimizers import optimizer_kind
from .parameters import cast_for_training

TOKENS = 77
"""Of a caption, as CLIP's text encoders have them."""

LIBRARIES = 3e9
"""Bytes that CUDA's context, workspaces and the allocator's unused blocks may need in addition to the estimate."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, if everything that a step needs were allocated at once.

    Without gradient accumulation, gradients are allocated while activations are freed, so the peak is somewhat lower.
    Not included are libraries (CUDA's context, cuDNN's workspaces, NCCL's buffers: 1 to 3 GB), unused blocks of the
    allocator, and activations of autoencoder and text encoders if their results are not cached.
    """

    weights: int
    """Trained or frozen, complete or this process's shard."""
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    """Weights of other processes' shares while they are needed, and gradients before they are divided."""
    activations: int
    """Kept for the backward pass, copies of weights in half precision among them."""
    recomputed: int
    """Under gradient checkpointing: of the largest layer in the backward pass, or copies of all weights in half
    precision, which autocast keeps until the forward pass ends."""
    frozen: int
    """Networks that are not trained and whose results are not cached."""

    @property
    def total(self) -> int:
        """Of all."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.ema,
            "gathered": self.gathered,
            "activations": self.activations + self.recomputed,
            "frozen networks": self.frozen,
        }
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in named.items() if size)
        return f"{self.total / 1e9:.2f} GB on each device: {parts}"


def estimate_memory(
    unet: Any, config: NetworkConfig, half: torch.dtype | None, size: Size, processes: int = 1, frozen: int = 0
) -> MemoryEstimate:
    """Estimate what training takes on each device.

    Args:
        unet: a UNet2DModel or UNet2DConditionModel as it is trained, adapters included; on any device, also meta.
        config: how it is computed, and its batch.
        half: dtype of mixed precision; None for none.
        size: height and width of a sample as the network has it, for latents an eighth of the image's.
        processes: that share the work.
        frozen: bytes of networks that are not trained.
    """
    share = config.shards_over(processes)
    sharded = share > 0
    bare = cast_for_training(_empty_copy(unet, "meta"), half, config.full_bf16)
    trained = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    weights, count = _bytes(bare.parameters()), sum(parameter.numel() for parameter in trained)
    gathered = _gathered_bytes(bare, half, config.sharding == "optimizer") if sharded else 0
    if sharded and config.sharding == "optimizer" and config.gradient_accumulation_steps > 1:
        gathered += 4 * count  # gradients, which go to their owners at the last pass
    if sharded and half is not None:
        bare.to(half)  # as they are gathered
    with FakeTensorMode():
        kept, recomputed = _saved_bytes(_empty_copy(bare, "cpu").train(), config, half, size)
    if config.gradient_checkpointing and half is not None and not sharded:
        recomputed = max(recomputed, _cast_bytes(bare, half))
    state_bytes, gradients = optimizer_kind(config).state_bytes, _gradient_bytes(trained, config)
    optimizer = sum(state_bytes(value.shape) for value in trained)
    ema = 4 * count if config.ema_decay and config.ema_device == "accelerator" else 0
    on_host = sharded and config.fsdp_offload_params
    own = [0 if on_host else size // max(share, 1) for size in (weights, gradients, optimizer, ema)]
    return MemoryEstimate(own[0], own[1], own[2], own[3], gathered, kept, recomputed, frozen)


def check_memory(
    config: NetworkConfig, gigabytes: float | None, estimate: Callable[[NetworkConfig], MemoryEstimate]
) -> MemoryEstimate:
    """What a step takes of each device's memory; refuse one that does not fit into a GPU.

    Args:
        config: of the run.
        gigabytes: that the GPU has, 1e9 bytes; None if it is not known, and nothing is refused.
        estimate: of a configuration.

    Raises:
        ValueError: with what it takes, and the options with which the same step would fit.
    """
    found = estimate(config)
    if gigabytes is None or found.total <= (room := gigabytes * 1e9 - LIBRARIES):
        return found

    def fits(options: dict[str, Any]) -> bool:
        return estimate(dataclasses.replace(config, **options)).total <= room

    smaller = list(_smaller_passes(config))
    remedy = "take a lower --resolution, or a LoRA of a lower --lora_rank; no batch is small enough"
    if smaller and fits(smaller[-1]):
        largest = next(filter(fits, smaller))
        remedy = f"pass {' '.join(f'--{name}={value}' for name, value in largest.items())} for the same in less"
    raise ValueError(
        f"A step takes {found.total / 1e9:.1f} GB, and of the {gigabytes:g} GB of the preset's GPU libraries leave "
        f"{room / 1e9:g}: {remedy}."
    )


def _smaller_passes(config: NetworkConfig) -> Iterator[dict[str, Any]]:
    """Options that take less and less memory for the same global batch."""
    options: dict[str, Any] = {} if config.gradient_checkpointing else {"gradient_checkpointing": True}
    batch, passes = config.train_batch_size, config.gradient_accumulation_steps
    if options:
        yield options
    while batch % 2 == 0:
        batch, passes = batch // 2, passes * 2
        yield {**options, "train_batch_size": batch, "gradient_accumulation_steps": passes}


def example_inputs(unet: Any, batch: int, size: Size) -> dict[str, Any]:
    """Arguments of a UNet's call as a training step has them; their contents mean nothing."""
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": torch.empty(batch, config.in_channels, *size),
        "timestep": torch.empty(batch, dtype=torch.int64),
    }
    if cross := config.get("cross_attention_dim"):
        inputs["encoder_hidden_states"] = torch.empty(batch, TOKENS, cross)
    elif config.get("num_class_embeds"):
        inputs["class_labels"] = torch.empty(batch, dtype=torch.int64)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    return inputs


class _Saved:
    """Counts the memory that is kept for a backward pass, each block of it once."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._held: list[Tensor] = []  # else another block could come to its place
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor's memory, unless it was counted."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _saved_bytes(unet: Any, config: NetworkConfig, half: torch.dtype | None, size: Size) -> tuple[int, int]:
    """Bytes kept for the backward pass at a batch, and of the largest layer that is computed again for it."""
    saved, largest = _Saved(unet.parameters()), 0

    def checkpointed(layer: Callable[..., Any], *args: Any) -> Any:
        """In place of torch's checkpoint: keep what goes in, and measure what is not kept."""
        nonlocal largest
        inside = _Saved(unet.parameters())
        for one in args:
            if isinstance(one, Tensor):
                saved.add(one)
        with torch.autograd.graph.saved_tensors_hooks(inside.add, _unpack):
            result = layer(*args)
        largest = max(largest, inside.bytes)
        return result

    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing(checkpointed)
    inputs = example_inputs(unet, config.train_batch_size, size)
    if half is not None and "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(half)
    precision = torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, _unpack), precision, _norms_in_float32(unet, half):
        output = unet(**inputs, return_dict=False)[0].float()
        (output - torch.empty_like(output)).square().mean()
    return saved.bytes, largest


@contextmanager
def _norms_in_float32(unet: nn.Module, half: torch.dtype | None) -> Iterator[None]:
    """Context in which norms compute in float32, as in CUDA's autocast but not in the CPU's."""

    def widen(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(), *args[1:])

    norms = [layer for layer in unet.modules() if isinstance(layer, nn.GroupNorm | nn.LayerNorm)]
    hooks = [layer.register_forward_pre_hook(widen) for layer in norms] if half is not None else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _empty_copy(unet: Any, device: str) -> Any:
    """A copy whose tensors are empty: on the meta device, or fake ones under a fake mode."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(
            torch.empty(value.shape, dtype=value.dtype, device=device), requires_grad=value.requires_grad
        )
        for value in unet.parameters()
    }
    memo |= {id(value): torch.empty(value.shape, dtype=value.dtype, device=device) for value in unet.buffers()}
    return copy.deepcopy(unet, memo)


def _cast_bytes(unet: nn.Module, half: torch.dtype) -> int:
    """Bytes of the copies that autocast makes of trained weights of products."""
    products = (layer for layer in unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    values = (value for layer in products for value in layer.parameters(recurse=False))
    return half.itemsize * sum(value.numel() for value in values if value.dtype != half)


def _gathered_bytes(unet: Any, half: torch.dtype | None, keeps_parameters: bool) -> int:
    """Bytes of gathered weights: all of them, or the largest layer's and the next one's, which comes meanwhile."""
    size = 4 if half is None else half.itemsize
    if keeps_parameters:
        return size * sum(parameter.numel() for parameter in unet.parameters())
    layers = [layer for layer in unet.modules() if type(layer).__name__ in SHARDED_LAYERS]
    return 2 * size * max((sum(value.numel() for value in layer.parameters()) for layer in layers), default=0)


def _gradient_bytes(trained: Sequence[Tensor], config: NetworkConfig) -> int:
    """Bytes of gradients, or of the largest one, and of what its update takes where weights are in bfloat16."""
    counts, size = [value.numel() for value in trained], 2 if config.full_bf16 else 4
    largest = max(counts, default=0)
    # Weight and gradient in float32, what the optimizer makes of them, and random numbers for rounding.
    update = 6 * 4 * largest if config.full_bf16 else 0
    return size * (largest if config.fused_backward_pass else sum(counts)) + update


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _unpack(tensor: Tensor) -> Tensor:
    """What was packed; nothing is read here."""
    return tensor

"""The trained network: its precision, layout, sharding and EMA."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import nn

from .accelerator import mixed_precision_dtype
from .checkpointing.checkpoint import Tensors
from .config import NetworkConfig
from .ema import MovingAverage
from .fsdp import apply_fsdp, full_model, gather_full_tensors
from .parameters import cast_for_training, trainable_parameters
from .speed import no_compile, prepare_memory_and_compile


class TrainedNetwork:
    """A UNet in training, and the EMA of its trained parameters.

    Attributes:
        module: the UNet itself, without wrappers.
        unet: the module that is called in a step, possibly wrapped by accelerate.
        sharded: whether it is sharded over processes, or offloaded.
        parameters: the trained ones, in the network's order.
        ema: the EMA, or None.
        accelerator: of the run.
    """

    def __init__(self, unet: Any, config: NetworkConfig, accelerator: Accelerator) -> None:
        """Take a UNet, in place.

        Args:
            unet: to be trained.
            config: how it is computed and averaged.
            accelerator: of the run.
        """
        self.accelerator, self._config = accelerator, config
        half = mixed_precision_dtype(accelerator)
        self.module = cast_for_training(unet, half, config.full_bf16).train()
        prepare_memory_and_compile(self.module, config)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self.sharded = config.shards_over(accelerator.num_processes) > 0
        if self.sharded:
            apply_fsdp(self.module, config, accelerator.device, accelerator.num_processes, half)
        self.parameters: list[nn.Parameter] = [*trainable_parameters(self.module).values()]
        self.ema = self._create_ema(config) if config.ema_decay else None
        # Evaluation mode: what is sharded averages gradients itself, and must not be wrapped again for that.
        self.unet = accelerator.prepare_model(self.module, evaluation_mode=self.sharded)

    def _create_ema(self, config: NetworkConfig) -> MovingAverage:
        """The EMA, on its device."""
        ema = MovingAverage(
            self.parameters, config.ema_decay, config.ema_warmup, self.module, config.ema_update_interval
        )
        on_host = config.ema_device == "cpu" or config.fsdp_offload_params
        ema.to("cpu" if on_host else self.accelerator.device)
        return ema

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """One forward and backward pass of a step, `last` or not; gradients go to other processes at the last."""
        if self.sharded and self._config.sharding == "optimizer":
            self.module.set_requires_gradient_sync(last)  # accelerate does it for what it has sharded itself
        with self.accelerator.accumulate(self.unet):
            yield

    def update_ema(self) -> None:
        """Update the EMA with the current weights."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextlib.contextmanager
    def export_unet(self, tensors: Callable[[], Tensors], everywhere: bool = False) -> Iterator[Any]:
        """In the main process the UNet with the weights to export, None in others; collective.

        Args:
            tensors: the state of the run, by file and name, of which every process has its part.
            everywhere: in other processes too, unless the network is divided among them.
        """
        is_main = self.accelerator.is_main_process
        if self.sharded:
            state = tensors()
            weights = gather_full_tensors({"unet": {**state["unet"], **state.get("ema", {})}}, keep=is_main)
            yield full_model(self.module, weights["unet"], self.accelerator.device) if is_main else None
            return
        if not (is_main or everywhere):
            yield None
            return
        self.module.eval()
        try:
            averaged = contextlib.nullcontext() if self.ema is None else self.ema.swapped_in(self.parameters)
            with averaged, no_compile(self._config):
                yield self.module
        finally:
            self.module.train()

"""The network of a run while it is trained: its precision and layout, whole or divided, and its moving average."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from .accelerator import mixed_precision_dtype
from .checkpointing.checkpoint import Tensors
from .config import ComputeConfig
from .fsdp import apply_fsdp, full_model, gather_full_tensors
from .parameters import cast_for_training, trainable_parameters
from .speed import no_compile, prepare_memory_and_compile


class TrainedNetwork:
    """A UNet in training, and the moving average of its trained parameters.

    Attributes:
        module: the UNet itself, outside of any wrapper.
        unet: what is called in a step; the module, or a wrapper of accelerate's around it.
        sharded: whether it is divided over processes.
        ema: the moving average; None if there is none.
        accelerator: of the run.
    """

    def __init__(
        self, unet: Any, config: ComputeConfig, accelerator: Accelerator, ema_decay: float, ema_warmup: bool
    ) -> None:
        """Take a UNet, in place.

        Args:
            unet: to be trained.
            config: how it is computed.
            accelerator: of the run.
            ema_decay: of the moving average; 0 for none.
            ema_warmup: let the decay rise to its value.
        """
        self.module = cast_for_training(unet, mixed_precision_dtype(accelerator)).train()
        prepare_memory_and_compile(self.module, config)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self.sharded = config.sharding != "none" and accelerator.num_processes > 1
        if self.sharded:
            apply_fsdp(self.module, accelerator.device, accelerator.num_processes, config.sharding == "optimizer")
        self.ema = self._create_ema(ema_decay, ema_warmup, accelerator)
        # Evaluation mode: what is sharded averages gradients itself, and must not be wrapped again for that.
        self.unet = accelerator.prepare_model(self.module, evaluation_mode=self.sharded)
        self.accelerator, self._config = accelerator, config

    def _create_ema(self, decay: float, warmup: bool, accelerator: Accelerator) -> EMAModel | None:
        """diffusers' `EMAModel` of the trained parameters; None for decay 0."""
        if decay == 0:
            return None
        ema = EMAModel(
            self.parameters(),
            decay=decay,
            min_decay=0.0 if warmup else decay,
            foreach=True,
            model_cls=type(self.module),
            model_config=self.module.config,
        )
        ema.to(accelerator.device)
        return ema

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the network's order."""
        return [*trainable_parameters(self.module).values()]

    def update_ema(self) -> None:
        """Update the moving average with the current weights."""
        if self.ema is not None:
            self.ema.step(self.parameters())

    @contextlib.contextmanager
    def export_unet(self, tensors: Callable[[], Tensors]) -> Iterator[Any]:
        """In the main process the UNet with the weights to export, None in others; collective.

        Args:
            tensors: the state of the run, by file and name, of which every process has its part.
        """
        is_main = self.accelerator.is_main_process
        if self.sharded:
            state = tensors()
            weights = gather_full_tensors({"unet": {**state["unet"], **state.get("ema", {})}}, keep=is_main)
            yield full_model(self.module, weights["unet"], self.accelerator.device) if is_main else None
            return
        if not is_main:
            yield None
            return
        self.module.eval()
        try:
            with self._ema_weights(), no_compile(self._config):
                yield self.module
        finally:
            self.module.train()

    @contextlib.contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Swap the moving average in for the UNet's weights, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.parameters())

"""The state of a run, by name: saved and restored bit for bit, on any device.

It has no random generator states, since all randomness is a function of the seed and the position in the run. The
learning rate and other optimizer settings are not saved either: the resumed run's settings apply.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..fsdp import distribute_all_like, distribute_like
from ..parameters import load_trainable_state_dict, trainable_parameters, trainable_state_dict
from ..speed import copy_with_strides_of
from .checkpoint import Tensors


@dataclass
class TrainingState:
    """The parts of a run that training changes.

    Args:
        networks: the trained networks, by name, without wrappers, including `unet`.
        optimizer: of their trained parameters.
        ema: EMA of the parameters of `unet`.
        scaler: loss scaler for float16.
        group_values: values of parameter groups that the optimizer updates itself.
    """

    networks: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None = None
    scaler: Any = None
    group_values: Sequence[str] = ()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint, sharded or not, by file and name: networks, `optimizer` and `ema`."""
        found = {name: trainable_state_dict(network) for name, network in self.networks.items()}
        found["optimizer"] = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in zip(self._optimized_names(), self._optimized_parameters(), strict=True)
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        if self.ema is not None:
            found["ema"] = dict(zip(self._ema_names(), self.ema.shadow_params, strict=True))
        return found

    def numbers(self) -> dict[str, Any]:
        """All values of a checkpoint except tensors, JSON-serializable."""
        found: dict[str, Any] = {}
        if self.ema is not None:
            found["ema_steps"] = self.ema.optimization_step
        if self.scaler is not None:
            found["scaler"] = self.scaler.state_dict()
        if self.group_values:
            groups = self.optimizer.param_groups
            found["optimizer"] = [{name: float(group[name]) for name in self.group_values} for group in groups]
        return found

    def restore(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `numbers` returned, given as full tensors.

        A new EMA or scaler starts from the beginning; one that is no longer used is dropped.

        Raises:
            ValueError: they belong to other networks.
        """
        try:
            for name, network in self.networks.items():
                load_trainable_state_dict(network, distribute_all_like(tensors[name], network.state_dict()))
            self._restore_optimizer(tensors["optimizer"])
            if self.ema is not None:
                averaged = tensors["ema"] if "ema" in tensors else tensors["unet"]
                for name, shadow in zip(self._ema_names(), self.ema.shadow_params, strict=True):
                    shadow.copy_(distribute_like(averaged[name], shadow))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint belongs to other networks: {error}") from error
        if self.ema is not None:
            self.ema.optimization_step = numbers.get("ema_steps", 0)
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        for group, values in zip(self.optimizer.param_groups, numbers.get("optimizer", ()), strict=False):
            group.update({name: values[name] for name in self.group_values})

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the optimizer's state from tensors named `network.parameter.key`; settings stay those of this run."""
        by_parameter: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            parameter, _, key = name.rpartition(".")
            by_parameter[parameter][key] = value
        names = self._optimized_names()
        if unknown := sorted(set(by_parameter) - set(names)):
            raise KeyError(", ".join(unknown))
        state = {
            index: {key: _restore_state_value(parameter, value) for key, value in by_parameter[name].items()}
            for index, (name, parameter) in enumerate(zip(names, self._optimized_parameters(), strict=True))
            if name in by_parameter
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for index, weight in enumerate(self._optimized_parameters()):
            if weight.dtype == torch.bfloat16 and index in state:  # to which torch has cast what is kept in float32
                self.optimizer.state[weight] = {
                    key: value.to(weight.device) if isinstance(value, Tensor) else value
                    for key, value in state[index].items()
                }

    def _optimized_parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _optimized_names(self) -> list[str]:
        """Names `network.parameter` of the optimizer's parameters, in its order."""
        names = {
            id(parameter): f"{network}.{name}"
            for network, module in self.networks.items()
            for name, parameter in trainable_parameters(module).items()
        }
        return [names[id(parameter)] for parameter in self._optimized_parameters()]

    def _ema_names(self) -> list[str]:
        """Names of the parameters in the EMA, in its order."""
        return list(trainable_parameters(self.networks["unet"]))


def _restore_state_value(parameter: Tensor, value: Tensor) -> Tensor | int:
    """A value read from a checkpoint, with the dtype, shard and layout of the parameter's optimizer state.

    A copy, since the loaded value is a view of the file, which would keep it on disk after its removal.
    """
    if value.dtype == torch.int64 and value.ndim == 0:
        return int(value)
    return copy_with_strides_of(distribute_like(value, parameter), parameter)

"""Asynchronous copies of a few numbers from the device."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory, started immediately and synchronized when it is read.

    A blocking copy would wait for all work queued on the device, including work queued after the numbers were
    computed. On a CPU there is no delay.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[float]:
        """The numbers, after waiting for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._tensor.tolist()]

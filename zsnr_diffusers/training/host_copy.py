"""A few numbers on their way from the device, which meanwhile goes on with what it was given after them."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in the host's memory, begun at once and waited for when it is read.

    A blocking copy would wait for all that was queued on the device, and so for work that was queued after the numbers
    were known. On a CPU nothing is on its way.

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
        """The numbers, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._tensor.tolist()]

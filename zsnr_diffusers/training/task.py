"""Base class of a training task: everything that depends on the kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from ..schedulers.base import ZeroSNRScheduler
from ..utils.distributed import Processes
from .config import DataConfig
from .data.dataset import Images, Rows
from .data.loader import Batch, TrainingDataset
from .objective import NoisedBatch, Objective
from .schedule import Schedule


class Task(ABC):
    """Opens model and data, and defines their training step.

    `unet` is the network that is trained, `schedule` its noise levels, `betas` are those of the base at zero
    terminal SNR, the schedule itself unless it is of flow times, and None of a flow-matching base. `objective` is what
    the network is asked, and `rows` are the data, as `data` names them.

    Raises:
        ValueError: model or data cannot be used.
        OSError: they are not there.
    """

    data: DataConfig
    unet: ModelMixin
    schedule: Schedule
    betas: ZeroSNRScheduler | None
    objective: Objective
    rows: Rows
    trained_timesteps: Sequence[int] | None = None
    """The few timesteps that are trained; None for all."""

    @abstractmethod
    def initial_networks(self) -> Mapping[str, torch.nn.Module]:
        """Networks that training starts from, by name; none for a new one."""

    @abstractmethod
    def summary(self, samples: Any) -> dict[str, str]:
        """Lines of the plan, by name: what is done to which model, on which samples."""

    @abstractmethod
    def sample_size(self) -> tuple[int, int]:
        """Height and width of what the network is given."""

    def frozen_bytes(self, half: torch.dtype | None) -> int:
        """Device memory of frozen networks, in addition to the trained one, with mixed precision `half`."""
        return 0

    @abstractmethod
    def samples(self, images: Images, global_batch: int = 1, held_out: Sequence[int] = ()) -> TrainingDataset:
        """The training samples of the rows that can be used, from `check_images`, without those kept aside."""

    def plan_cache(  # noqa: B027
        self, accelerator: Accelerator, processes: Processes, samples: Any, count: int
    ) -> None:
        """Find out which results of frozen networks are cached; nothing is written. Called before `summary`.

        Args:
            accelerator: of the run.
            processes: of the run.
            samples: that it draws.
            count: samples that it will show.
        """

    def measure_cache(self, accelerator: Accelerator, processes: Processes, samples: Any) -> TrainingDataset:
        """Print how long computing the missing results of frozen networks would take, for a run that is only measured.

        Returns:
            The samples to measure steps on, few of them if their results are cached.
        """
        return samples

    def prepare(self, accelerator: Accelerator, processes: Processes, samples: Any) -> TrainingDataset:
        """Move frozen networks to their devices, or cache their results.

        Returns:
            The samples to train on.
        """
        return samples

    def encode(self, batch: Batch) -> Batch:
        """A batch on the device with what frozen networks give instead of their inputs."""
        return batch

    @abstractmethod
    def x_0(self, batch: Batch) -> Tensor:
        """Clean samples to noise from `encode`d batches, float32 [B, C, H, W], without gradients."""

    def noised_batch(self, batch: Batch, timesteps: Tensor) -> NoisedBatch:
        """What the network is asked at a step, and what it should answer.

        Args:
            batch: on the device.
            timesteps: of it, shape [B], best on the CPU, where reading them does not wait.
        """
        return self.objective.noised_batch(self.x_0(batch), batch["noise"], timesteps, batch["timestep"])

    @abstractmethod
    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output for x_t under the conditions of a batch from `encode`."""

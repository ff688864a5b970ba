"""Training a pixel-space network, with classes or without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ...hub.model_card import terminal_snr
from ...schedulers import FlowMatchMultistepScheduler, ZeroSNRDDPMScheduler
from ...schedulers.config import is_flow
from ..config.objective import FLOW
from ..data.dataset import Images, noise_rows, open_rows
from ..data.loader import Batch
from ..objective import create_objective
from ..reporting.model_card import TrainingRecord
from ..schedule import Schedule, check_base_schedule, check_zero_snr_base
from ..task import Task
from .base import load_base, new_unet
from .classes import read_classes
from .config import PixelOutputConfig, PixelTaskConfig
from .output import PixelOutput
from .samples import LabelledDataset


class PixelTask(Task):
    """A new pixel-space network, or one to continue from.

    Args:
        config: network and schedule, data and objective.
    """

    unet: UNet2DModel

    def __init__(self, config: PixelTaskConfig) -> None:
        self.config = self.data = config
        name, column = config.pretrained_model_name_or_path, config.class_column
        self.base = base = load_base(name, config.resolution, column)
        if config.has_data:
            self.rows = open_rows(config)
        else:
            self.rows = noise_rows(config.image_column, config.resolution or 32, **({column: 0} if column else {}))
        count = base.unet.config.num_class_embeds - 1 if base and column else None
        self.classes = None if column is None else read_classes(self.rows, column, count)
        classes = None if self.classes is None else self.classes.count
        self.unet = base.unet if base else new_unet(config, classes, config.resolution, config.seed)
        self.schedule, self.betas = self._create_schedules()
        config.check_schedule(terminal_snr(self.schedule) == 0)
        self.objective = create_objective(config, self.schedule, self.betas)

    def create_output(self, config: PixelOutputConfig, record: TrainingRecord) -> PixelOutput:
        """What comes out of training: previews and the result.

        Args:
            config: how images are sampled.
            record: of the training, for the model card.
        """
        name, network = self.config.pretrained_model_name_or_path, self.config.unet
        subject = f"A new `{network}`" if name is None else Path(name).name
        data = self.config.dataset_name
        return PixelOutput(config, self.schedule, self.base, self.classes, subject, data, record)

    def _create_schedules(self) -> tuple[Schedule, ZeroSNRDDPMScheduler | None]:
        """The schedule that is trained, and that of betas; None for a flow-matching base."""
        config, base = self.config, self.base
        if base is not None:
            name = str(config.pretrained_model_name_or_path)
            check_base_schedule(base.scheduler, name, config.network_prediction)
            if config.flow_through_bridge:
                check_zero_snr_base(base.scheduler, name, "--flow_through_bridge")
        betas = None if base and is_flow(base.scheduler.config) else self._create_betas()
        if betas is not None and config.network_prediction != FLOW:
            return betas, betas
        return FlowMatchMultistepScheduler(shift=config.flow_shift), betas

    def _create_betas(self) -> ZeroSNRDDPMScheduler:
        """The schedule of betas of the base or of the configuration."""
        config, base = self.config, self.base
        betas = {
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
        }
        kind = config.network_prediction
        return ZeroSNRDDPMScheduler.from_config(
            betas if base is None else base.scheduler.config,
            prediction_type="v_prediction" if kind == FLOW else kind,  # what flow matching takes of betas has no other
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            variance_type=config.variance_type,
            clip_sample=True,
        )

    def initial_networks(self) -> Mapping[str, torch.nn.Module]:
        """The UNet to continue training from; none for a new one."""
        return {} if self.config.pretrained_model_name_or_path is None else {"unet": self.unet}

    def summary(self, samples: LabelledDataset) -> dict[str, str]:
        """Lines of the plan: network, prediction type, schedule and data."""
        config, unet = self.config, self.unet.config
        parameters = sum(p.numel() for p in self.unet.parameters())
        name = config.pretrained_model_name_or_path or f"{config.unet}, new"
        classes = "" if self.classes is None else f" of {self.classes.count} classes"
        side = unet.sample_size
        return {
            "network": f"{name}, {parameters:,} parameters, {unet.in_channels} channels",
            "prediction": config.prediction_type,
            **({"flow times": config.describe_flow_times()} if config.is_flow else {}),
            "SNR at the last timestep": f"{terminal_snr(self.schedule):.4g}",
            "data": f"{len(samples.usable_rows):,} images{classes} at {side} x {side}",
        }

    def sample_size(self) -> tuple[int, int]:
        """Height and width of images."""
        return self.unet.config.sample_size, self.unet.config.sample_size

    def samples(self, images: Images, global_batch: int = 1, held_out: Sequence[int] = ()) -> LabelledDataset:
        """Training samples: images in the network's size, their classes, and noise."""
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        labels, no_class = (None, 0) if self.classes is None else (self.classes.labels, self.classes.count)
        shape, steps = (channels, side, side), len(self.schedule)
        offset = self.config.noise_offset
        return LabelledDataset(self.rows, images, self.config, labels, shape, steps, no_class, offset, held_out)

    def x_0(self, batch: Batch) -> Tensor:
        """The batch's images."""
        return batch["pixel_values"]

    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The network's output under the classes, if it has any."""
        timestep = batch["timestep"].to(x_t.device)
        output: Tensor = unet(x_t, timestep, batch.get("class_labels"), return_dict=False)[0]
        return output

"""Training of Stable Diffusion: captioned images, their latents, and the conditioned UNet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...hub.model_card import terminal_snr
from ...utils.distributed import Processes
from ..accelerator import mixed_precision_dtype
from ..config.data import is_encoded
from ..config.objective import FLOW
from ..data.buckets import round_up_to_batches
from ..data.dataset import Images, noise_rows, open_file_index, open_rows
from ..data.encoded import EncodedRows
from ..data.loader import Batch
from ..objective import NoisedBatch, create_objective
from ..parameters import base_state_dict
from ..reporting.model_card import TrainingRecord
from ..schedule import check_zero_snr_base
from ..task import Task
from .base import load_base
from .config import GuidedOutputConfig, StableDiffusionTaskConfig
from .distillation import Distillation, create_distillation
from .embedding_cache import EmbeddingCache
from .encoders import Autoencoder
from .lora import describe_adapter, prepare_adapter
from .output import StableDiffusionOutput
from .row_cache import Rows
from .samples import CaptionedDataset

_MEASURED_IMAGES = 64


class StableDiffusionTask(Task):
    """Stable Diffusion 1.x, 2.x or XL on captioned images.

    Args:
        config: base, adapter, data and objective.
    """

    unet: UNet2DConditionModel
    distillation: Distillation | None = None
    """Makes the target from a teacher's steps, if it is not made from the data."""

    def __init__(self, config: StableDiffusionTaskConfig) -> None:
        self.config = self.data = config
        kind, zero = config.network_prediction, config.rescale_betas_zero_snr
        self.base = load_base(config, kind, zero, config.flow_shift)
        for option in config.of_zero_snr_bases:
            check_zero_snr_base(self.base.pipeline.scheduler, config.pretrained_model_name_or_path, option)
        self.unet, self.schedule = self.base.pipeline.unet, self.base.schedule
        self.betas = self.base.betas
        self.objective = create_objective(config, self.schedule, self.betas)
        if config.trains_adapter:
            prepare_adapter(self.base.pipeline, config, config.seed)
        if config.distill_steps:
            self.distillation = create_distillation(config, self.base, self.predict)
            self.trained_timesteps = self.distillation.timesteps
        config.check_schedule(terminal_snr(self.schedule) == 0)
        self.resolution = self.base.resolution(config.resolution)
        self.buckets = self.base.buckets(config)
        self.autoencoder = Autoencoder(self.base.pipeline.vae, self.base.architecture.uses_force_upcast)
        self.base.architecture.conditioning.chunks = config.max_token_length // 75
        self.text_encoder = self.base.architecture.text_encoder(config.clip_skip)
        self.embedding_cache = EmbeddingCache(
            config,
            (self.autoencoder, self.text_encoder),
            open_file_index(config),
            EncodedRows.open(Path(str(config.train_data_dir))) if is_encoded(config.train_data_dir) else None,
            self.base.reload_frozen,
        )
        if config.has_data:
            self.rows = open_rows(config)
        else:
            self.rows = noise_rows(config.image_column, self.resolution, **{config.caption_column: ""})
        self._text_dtype = torch.float32

    def create_output(self, config: GuidedOutputConfig, record: TrainingRecord) -> StableDiffusionOutput:
        """What comes out of training: previews and the result.

        Args:
            config: by which the result is sampled.
            record: of the training, for the model card.
        """
        return StableDiffusionOutput(
            config,
            adapter=self.config,
            base=self.base,
            embedding_cache=self.embedding_cache,
            resolution=self.resolution,
            rows=self.rows.select_columns([self.config.caption_column]),
            caption_column=self.config.caption_column,
            clip_skip=self.config.clip_skip,
            record=record,
        )

    def initial_networks(self) -> Mapping[str, torch.nn.Module]:
        """The base's UNet, autoencoder and text encoders."""
        return {name: getattr(self.base.pipeline, name) for name in self.base.architecture.networks}

    def summary(self, samples: CaptionedDataset) -> dict[str, str]:
        """Lines of the plan: base, adapter, prediction type, schedule, data and caches."""
        before = self.base.pipeline.scheduler
        parameters = sum(value.numel() for value in base_state_dict(self.unet).values())
        return {
            "base": f"{self.config.pretrained_model_name_or_path}, UNet of {parameters / 1e6:.1f} M parameters",
            **({"adapter": describe_adapter(self.unet, self.config)} if self.config.trains_adapter else {}),
            **({"distilled": self.config.describe_teacher()} if self.config.distill_steps else {}),
            "prediction": f"{before.config.get('prediction_type', FLOW)} -> {self._describe_prediction()}",
            "SNR at the last timestep": f"{terminal_snr(before):.4g} -> {terminal_snr(self.schedule):.4g}",
            **({"flow times": self.config.describe_flow_times()} if self.config.is_flow else {}),
            **self._describe_data(samples),
            **{f"cached {name}": str(status) for name, status in self.embedding_cache.statuses.items()},
        }

    def _describe_prediction(self) -> str:
        """The trained prediction type in words, for the plan."""
        config = self.config
        return f"{FLOW} of {config.network_prediction}" if config.flow_through_bridge else config.prediction_type

    def _describe_data(self, samples: CaptionedDataset) -> dict[str, str]:
        """Lines of the plan about images and aspect-ratio buckets."""
        count, side = len(samples.usable_rows), self.resolution
        if not self.config.aspect_ratio_buckets:
            return {"data": f"{count:,} images at {side} x {side}"}
        batch, lines = samples.batch, {}
        for (height, width), rows in samples.buckets.items():
            shown = round_up_to_batches(len(rows), batch)
            lines[f"{width} x {height}"] = (
                f"{len(rows):,} images, {shown // batch:,} global batches, {shown - len(rows):,} repeats"
            )
        repeats = samples.epoch_length - count
        data = f"{count:,} images in {len(lines)} buckets (width x height), and {repeats:,} repeats in an epoch"
        return {"data": data, **lines}

    def sample_size(self) -> tuple[int, int]:
        """Height and width of latents; those of other buckets have about as many pixels."""
        side = self.resolution // self.base.vae_scale_factor
        return side, side

    def frozen_bytes(self, half: torch.dtype | None) -> int:
        """Memory of autoencoder and text encoders whose results are not cached."""
        stored = self.embedding_cache.stored
        return sum(
            (part.arithmetic_dtype(half) or part.dtype).itemsize * value.numel()
            for part in self.embedding_cache.parts
            if part.name not in stored
            for value in part.network.parameters()
        )

    def samples(self, images: Images, global_batch: int = 1, held_out: Sequence[int] = ()) -> CaptionedDataset:
        """Training samples: images, token ids, and noise for latents."""
        base = self.base
        latents = (int(base.pipeline.vae.config.latent_channels), base.vae_scale_factor)
        return CaptionedDataset(
            self.rows,
            images,
            self.config,
            base.architecture.conditioning,
            self.buckets,
            latents,
            len(self.schedule),
            global_batch,
            self.config.noise_offset,
            held_out,
        )

    def plan_cache(
        self, accelerator: Accelerator, processes: Processes, samples: CaptionedDataset, count: int
    ) -> None:
        """Find which latents and text embeddings are cached."""
        self.embedding_cache.plan(accelerator, processes, samples, self.config.cache_folder, count)

    def measure_cache(
        self, accelerator: Accelerator, processes: Processes, samples: CaptionedDataset
    ) -> CaptionedDataset:
        """Time latents and text embeddings of a few images, in a temporary cache; see `Task.measure_cache`."""
        if not self.embedding_cache.stored or self.embedding_cache.encoded is not None:
            return samples
        few = self.samples(samples.first_images(_MEASURED_IMAGES), samples.batch)
        hours = self.embedding_cache.benchmark(accelerator, processes, few)
        accelerator.print(f"measured: computing the missing cache would take {hours:,.1f} hours, before training")
        return few

    def prepare(self, accelerator: Accelerator, processes: Processes, samples: CaptionedDataset) -> CaptionedDataset:
        """Cache latents and text embeddings as planned, and free the device for the UNet."""
        self._text_dtype = mixed_precision_dtype(accelerator) or torch.float32
        self.embedding_cache.populate(accelerator, processes, samples)
        self._no_caption = samples.text_inputs("") if self.distillation else {}
        return samples

    def encode(self, batch: Batch) -> Batch:
        """Latent moments and text embeddings, computed unless they are cached."""
        encoded = dict(batch)
        for part, read in ((self.autoencoder, "pixel_values"), (self.text_encoder, "input_ids")):
            if read in encoded:
                encoded |= part(encoded.pop(read))
        return encoded

    def noised_batch(self, batch: Batch, timesteps: Tensor) -> NoisedBatch:
        """See `Task.noised_batch`; in a distillation, what the student meets, and where the teacher goes."""
        if self.distillation is None:
            return super().noised_batch(batch, timesteps)
        alone = {name: value[None].to(batch["noise"].device) for name, value in self._no_caption.items()}
        batch = {**batch, **self._text(batch)}
        return self.distillation.noised_batch(batch, timesteps, self._text(alone))

    def _text(self, batch: Batch) -> Rows:
        """Text states of a batch, which holds them already or has token ids."""
        return batch if "text" in batch else self.text_encoder(batch["input_ids"])

    def x_0(self, batch: Batch) -> Tensor:
        """Scaled latents sampled from the autoencoder's posterior."""
        latents = batch["mean"].float() + batch["std"].float() * batch["posterior_noise"]
        scaled: Tensor = latents * self.base.pipeline.vae.config.scaling_factor
        return scaled

    def predict(self, unet: Any, x_t: Tensor, batch: Batch) -> Tensor:
        """The UNet's output, conditioned on captions and for XL also on sizes and crops."""
        text = dict(self._text(batch))
        # Once, where autocast would make a copy for each of the layers that read it.
        text["text"] = text["text"].to(x_t.device, self._text_dtype)
        return self.base.architecture.predict(unet, x_t, batch["timestep"].to(x_t.device), text, batch)

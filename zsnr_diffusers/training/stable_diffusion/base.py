"""The Stable Diffusion pipeline that training starts from."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ...hub.damage import check_folder_weights
from ...hub.errors import explain_hub_errors
from ...hub.files import INDEX, find_only_variant
from ...hub.header import Header, is_single_file
from ...hub.load import load_pipeline
from ...hub.save import save_pipeline
from ...hub.saved_model import SavedModel
from ...hub.weight_files import weight_variants, with_single_dtype
from ...schedulers import FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler
from ...schedulers.config import is_flow
from ..config.objective import FLOW
from ..data.buckets import bucket_sizes
from ..data.transforms import Size
from ..schedule import Schedule, check_base_schedule
from .architectures import ARCHITECTURES, Architecture
from .config import BaseConfig, CaptionedDataConfig


@dataclass
class Base:
    """A pipeline, what it was read from, and the noise schedule that it is to be trained on."""

    architecture: Architecture
    saved: SavedModel
    """A folder or a single file."""
    variant: str | None
    """Of the weights of a folder."""
    schedule: Schedule
    """Of the network that is trained."""
    config: BaseConfig
    """By which it was loaded."""

    @property
    def pipeline(self) -> Any:
        """The base's pipeline, of a stock class."""
        return self.architecture.pipeline

    @property
    def betas(self) -> ZeroSNRDDIMScheduler | None:
        """The base's own schedule at zero terminal SNR; None for a flow-matching model."""
        if isinstance(self.schedule, ZeroSNRDDIMScheduler):
            return self.schedule
        own = self.pipeline.scheduler.config
        return None if is_flow(own) else _create_betas_schedule(own, "v_prediction", rescale_betas_zero_snr=True)

    def reload_frozen(self) -> None:
        """Give all networks but the UNet, which were moved to the device `meta`, their weights again."""
        unet = self.pipeline.unet
        if self.saved.folder is None:
            pipe = load_pipeline(self.saved)
        else:
            options = with_single_dtype({"variant": self.variant, **self.architecture.load_kwargs})
            pipe = self.architecture.pipeline_class.from_pretrained(self.saved.folder, unet=unet, **options)
        for name in self.architecture.networks:
            if name != "unet":
                _take_tensors(getattr(self.pipeline, name), getattr(pipe, name))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.pipeline.vae_scale_factor)

    def _size_multiple(self) -> int:
        """The number of pixels that image sides must be multiples of, for autoencoder and UNet."""
        return self.vae_scale_factor * int(2 ** (len(self.pipeline.unet.config.block_out_channels) - 1))

    def resolution(self, asked: int | None) -> int:
        """Pixels per side of training images, or the root of their number in aspect-ratio buckets.

        Raises:
            ValueError: not a multiple of what the autoencoder and the UNet halve.
        """
        pixels = asked or self.pipeline.unet.config.sample_size * self.vae_scale_factor
        if pixels % self._size_multiple():
            raise ValueError(f"--resolution={pixels} must be a multiple of {self._size_multiple()} for this model.")
        return int(pixels)

    def buckets(self, config: CaptionedDataConfig) -> list[Size]:
        """Sizes to which training images are resized and cropped.

        Raises:
            ValueError: as in `resolution`; or aspect-ratio buckets leave only a square.
        """
        pixels = self.resolution(config.resolution)
        if not config.aspect_ratio_buckets:
            return [(pixels, pixels)]
        sizes = bucket_sizes(pixels, self._size_multiple())
        if len(sizes) == 1:
            raise ValueError(
                f"--aspect_ratio_buckets: sides must be multiples of {self._size_multiple()} for this model, which "
                f"leaves only the square at --resolution={pixels}; increase it, or omit the option."
            )
        return sizes


def _take_tensors(network: nn.Module, source: nn.Module) -> None:
    """Share a network's tensors with another network of the same modules, without a copy."""
    for ours, theirs in zip(network.modules(), source.modules(), strict=True):
        ours._parameters.update(theirs._parameters)
        ours._buffers.update(theirs._buffers)


def load_base(config: BaseConfig, prediction_type: str, rescale_betas_zero_snr: bool, flow_shift: float = 1.0) -> Base:
    """Load the Stable Diffusion pipeline to train from a file, folder or the Hub, and check that it can be trained.

    Args:
        config: with the pipeline's name.
        prediction_type: that the network is trained to.
        rescale_betas_zero_snr: whether it is trained on zero terminal SNR.
        flow_shift: of a flow model.

    Raises:
        ValueError: its architecture is not supported.
        OSError: the folder or repo does not exist.
    """
    name = config.pretrained_model_name_or_path
    if is_single_file(name):
        options: dict[str, Any] = {} if config.base_config is None else {"config": config.base_config}
        saved, variant = SavedModel.open(name, **options), None
        architecture = _load_architecture_from_file(saved)
    else:
        folder, variant = _locate_folder(name, config.variant)
        saved = _open_pipeline_folder(folder)
        _check_no_adapter(name, check_folder_weights(name, folder))
        architecture = _load_architecture(name, saved, variant)
    _check_pipeline(name, architecture)
    check_base_schedule(architecture.pipeline.scheduler, name, prediction_type)
    schedule: Schedule
    if prediction_type == FLOW:
        schedule = FlowMatchMultistepScheduler(shift=flow_shift)
    else:
        schedule = _create_betas_schedule(
            architecture.pipeline.scheduler.config, prediction_type, rescale_betas_zero_snr
        )
    return Base(architecture, saved, variant, schedule, config)


def _create_betas_schedule(config: Any, prediction_type: str, rescale_betas_zero_snr: bool) -> ZeroSNRDDIMScheduler:
    """A DDIM schedule of betas from a scheduler's config, for latents, which are not clipped."""
    scheduler: ZeroSNRDDIMScheduler = ZeroSNRDDIMScheduler.from_config(
        config,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        clip_sample=False,  # latents have no range
    )
    return scheduler


@contextlib.contextmanager
def base_folder(base: Base, room: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The base's folder and its `model_index.json`; a single file is converted to a temporary one.

    Args:
        base: as it was loaded.
        room: folder to make it in.
    """
    if base.saved.folder is not None:
        yield base.saved.folder, base.saved.index
        return
    with tempfile.TemporaryDirectory(dir=room, prefix=".base-") as folder:
        # Once more from the file: of the base in memory, frozen parts may be in half precision by now.
        copy = save_pipeline(load_pipeline(base.saved), Path(folder, "base"))
        yield copy, SavedModel.open(copy).index


def _locate_folder(name: str, variant: str | None) -> tuple[Path, str | None]:
    """A pipeline's local folder, downloaded if necessary, and the variant of its weights."""
    here = Path(name).is_dir()
    with explain_hub_errors(name):
        folder = Path(name if here else DiffusionPipeline.download(name, variant=variant))
        if variant is None and None not in weight_variants(file.name for file in folder.glob("unet/*")):
            variant = find_only_variant(name, {})
            folder = folder if here else Path(DiffusionPipeline.download(name, variant=variant))
    return folder, variant


def _open_pipeline_folder(folder: Path) -> SavedModel:
    """Open a base pipeline's folder as a `SavedModel`; refuse one without `model_index.json`.

    Raises:
        ValueError: it is none of a pipeline.
    """
    saved = SavedModel.open(folder)
    if not saved.index:
        raise ValueError(
            f"{folder} has no {INDEX}, so it is not a diffusers pipeline. Convert a single-file checkpoint with: zsnr "
            "convert FILE FOLDER."
        )
    return saved


def _load_architecture(name: str, saved: SavedModel, variant: str | None) -> Architecture:
    """Load a folder's pipeline, wrapped in its `Architecture`."""
    entries = {part: saved.index.get(part) or [None, None] for part in _network_names()}
    parts = {part: str(entry[1]) for part, entry in entries.items() if entry[1]}
    architecture = _find_architecture(name, str(saved.index.get("_class_name")), parts)
    return architecture(
        architecture.pipeline_class.from_pretrained(
            saved.folder, **with_single_dtype({"variant": variant, **architecture.load_kwargs})
        )
    )


def _load_architecture_from_file(saved: SavedModel) -> Architecture:
    """Load a single file's pipeline, wrapped in its `Architecture`."""
    pipe = load_pipeline(saved)
    parts = {
        part: type(network).__name__ for part in _network_names() if (network := getattr(pipe, part, None)) is not None
    }
    architecture = _find_architecture(saved.name, type(pipe).__name__, parts)
    return architecture(architecture.pipeline_class(**{**pipe.components, **architecture.load_kwargs}))


def _network_names() -> list[str]:
    """Component names of all networks that any `Architecture` has."""
    return list(dict.fromkeys(part for architecture in ARCHITECTURES for part in architecture.networks))


def _find_architecture(name: str, cls: str, networks: Mapping[str, str]) -> type[Architecture]:
    """The `Architecture` that has exactly these network classes.

    Raises:
        ValueError: it is none that can be trained.
    """
    for architecture in ARCHITECTURES:
        if networks == architecture.networks:
            return architecture
    parts = ", ".join(f"{part}: {network}" for part, network in networks.items())
    known = "; or ".join(
        f"{architecture.name}: {', '.join(architecture.networks.values())}" for architecture in ARCHITECTURES
    )
    raise ValueError(
        f"{name} is a {cls} ({parts}){_refiner_hint(networks)}; only text-to-image models with these networks can be "
        f"trained here: {known}."
    )


def _check_no_adapter(name: str, headers: Mapping[Path, Header]) -> None:
    """Refuse a saved UNet with an adapter in it, whose renamed weights would load as random ones."""
    for file, header in headers.items():
        adapter = next((key for key in header.shapes if ".lora_" in key), None)
        if adapter and file.parent.name == "unet":
            raise ValueError(
                f"The UNet of {name} was saved with an adapter ({adapter} in {file.name}). Call pipe.fuse_lora() and "
                "pipe.unload_lora_weights() on the original pipeline, and save it again."
            )


def _refiner_hint(networks: Mapping[str, str]) -> str:
    """Part of an error text that says that these networks are XL's refiner; empty for others."""
    if "text_encoder_2" in networks and "text_encoder" not in networks:
        return (
            "; its single text encoder suggests the refiner of SDXL, which refines images and does not start from "
            "noise"
        )
    return ""


def _check_pipeline(name: str, architecture: Architecture) -> None:
    """Refuse a base pipeline whose UNet or latents cannot be trained here."""
    if reason := _unsupported_unet_input(architecture) or architecture.unsupported_reason():
        raise ValueError(
            f"{name} cannot be trained here: {reason}. Only text-to-image models of {architecture.name} can."
        )


def _unsupported_unet_input(architecture: Architecture) -> str | None:
    """Name of a UNet input that text-to-image models do not have; None if there is none."""
    unet, latents = architecture.pipeline.unet.config, architecture.pipeline.vae.config.latent_channels
    if unet.in_channels != latents:
        return f"its UNet takes {unet.in_channels} channels for {latents} of latents (inpainting, editing or depth?)"
    if unet.class_embed_type is not None:
        return f"its UNet takes classes (class_embed_type={unet.class_embed_type!r}; upscaling?)"
    if unet.time_cond_proj_dim is not None:
        return f"its UNet takes the guidance scale (time_cond_proj_dim={unet.time_cond_proj_dim}; distilled?)"
    return None

"""The initial network of a pixel-space run: a new one, or one to continue from."""

from typing import Any

import torch
from diffusers import UNet2DModel

from ...hub.load import load_pipeline
from ...unet import build_unet
from .config import NetworkConfig


def new_unet(config: NetworkConfig, class_count: int | None, resolution: int | None, seed: int) -> UNet2DModel:
    """A new UNet2DModel of a preset, initialized from the run's seed.

    Raises:
        ValueError: the network cannot halve the resolution at every level.
    """
    changes: dict[str, Any] = {"in_channels": config.in_channels, "out_channels": config.in_channels}
    if config.dropout is not None:
        changes["dropout"] = config.dropout
    if resolution is not None:
        changes["sample_size"] = resolution
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(config.unet, class_count, **changes)


def load_base(name: str | None, resolution: int | None, class_column: str | None) -> Any:
    """Load the pixel-space pipeline to continue training from; None if `name` is None.

    Args:
        name: of a folder or repo.
        resolution: the requested resolution.
        class_column: of the data.

    Raises:
        ValueError: it is not a supported pixel-space pipeline.
        OSError: the folder or repo does not exist.
    """
    if name is None:
        return None
    pipe = load_pipeline(name)
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DModel) or {"vae", "vqvae"} & set(pipe.components):
        raise ValueError(
            f"{name} is a {type(pipe).__name__}, not a pixel-space pipeline with a UNet2DModel, such as DDPMPipeline."
        )
    facts = unet.config
    if facts.in_channels != facts.out_channels or facts.in_channels not in (1, 3):
        raise ValueError(
            f"The network of {name} makes {facts.out_channels} channels from {facts.in_channels}; only networks with "
            "equal numbers, 1 or 3, can be trained here."
        )
    if facts.class_embed_type is not None:
        raise ValueError(f"The network of {name} has class_embed_type={facts.class_embed_type!r}; expected None.")
    if not isinstance(facts.sample_size, int) or (resolution or facts.sample_size) != facts.sample_size:
        raise ValueError(f"--resolution={resolution} is not the sample_size={facts.sample_size} of {name}: omit it.")
    if (class_column is None) != (facts.num_class_embeds is None):
        remedy = "leave out" if facts.num_class_embeds is None else "set the classes' column with"
        raise ValueError(
            f"The network of {name} has num_class_embeds={facts.num_class_embeds}: {remedy} --class_column."
        )
    return pipe

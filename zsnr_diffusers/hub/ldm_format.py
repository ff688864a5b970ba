"""Names and shapes of Stable Diffusion's weights in original single-file checkpoints.

Converts from diffusers to the original names. Before a checkpoint is written, diffusers' own conversion must restore
every weight bit for bit. Tables are taken from diffusers where they exist.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_utils as stock
from torch import Tensor, nn

from .layouts import SD_1, SD_2, SDXL, UNET, VAE, OriginalFormat


def detect_pipeline_layout(pipe: Any) -> OriginalFormat:
    """The original single-file layout that fits a pipeline's components.

    Raises:
        ValueError: none fits.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts.pop("safety_checker", None)
    found = {name: type(part).__name__ for name, part in parts.items()}
    needed = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    if found == {**needed, "text_encoder_2": "CLIPTextModelWithProjection"}:
        return SDXL
    if found == needed:
        # The encoder of 2.x is OpenCLIP's, and nothing else in a config tells the two apart.
        return SD_1 if pipe.text_encoder.config.hidden_act == "quick_gelu" else SD_2
    raise ValueError(
        f"{type(pipe).__name__} ({', '.join(f'{name}: {cls}' for name, cls in found.items())}) cannot be saved as a "
        "single file, which needs Stable Diffusion 1.x, 2.x or SDXL: "
        f"{', '.join(f'{name}: {cls}' for name, cls in needed.items())}, and for SDXL a second text encoder. Save it "
        "as a folder."
    )


def original_checkpoint(pipe: Any) -> dict[str, Tensor]:
    """A pipeline's weights under their original single-file names, in their dtype, on the CPU.

    Raises:
        ValueError: the pipeline's components or weights fit no layout, or diffusers could not read the result back.
    """
    layout = detect_pipeline_layout(pipe)
    unet, vae, texts = _cpu_state_dict(pipe.unet), _cpu_state_dict(pipe.vae), _text_encoders_by_prefix(pipe, layout)
    checkpoint = _rename_keys(unet, UNET, _unet_key_renamer(pipe.unet.config["layers_per_block"], unet))
    checkpoint |= _rename_keys(vae, VAE, _vae_key_renamer(len(pipe.vae.config["block_out_channels"])))
    checkpoint = {key: _as_convolution(key, tensor) for key, tensor in checkpoint.items()}
    for prefix, encoder in texts.items():
        weights = _text_encoder_state_dict(encoder)
        checkpoint |= (_rename_open_clip_keys if prefix == layout.open_clip else _rename_clip_keys)(weights, prefix)

    _check_round_trip("unet", unet, stock.convert_ldm_unet_checkpoint(dict(checkpoint), pipe.unet.config))
    _check_round_trip("vae", vae, stock.convert_ldm_vae_checkpoint(dict(checkpoint), pipe.vae.config))
    for prefix, encoder in texts.items():
        back = (
            stock.convert_open_clip_checkpoint(encoder, dict(checkpoint), prefix=prefix)
            if prefix == layout.open_clip
            else stock.convert_ldm_clip_checkpoint(dict(checkpoint))
        )
        _check_round_trip(type(encoder).__name__, _text_encoder_state_dict(encoder), back)
    return checkpoint


def _check_round_trip(part: str, weights: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> None:
    """Refuse a converted part if diffusers' own conversion does not restore every weight bit for bit."""
    lost = [key for key, tensor in weights.items() if key not in back or not torch.equal(back[key], tensor)]
    if lost or len(back) != len(weights):
        raise ValueError(f"diffusers could not read {(lost or [*back])[0]!r} of {part} back; save a folder instead.")


def _text_encoders_by_prefix(pipe: Any, layout: OriginalFormat) -> dict[str, nn.Module]:
    """A pipeline's text encoders by their key prefix in the original checkpoint."""
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if layout is SDXL else [])]
    if len({encoder.config.hidden_size for encoder in encoders}) < len(encoders):
        raise ValueError("diffusers distinguishes SDXL's two text encoders by their width, but here both are equal.")
    return dict(zip(filter(None, (layout.clip, layout.open_clip)), encoders, strict=True))


def _cpu_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A network's contiguous state dict on the CPU; refuse unfused adapters and offloaded weights."""
    weights = {key: tensor.detach() for key, tensor in module.state_dict().items()}
    for key, tensor in weights.items():
        if "lora" in key:
            raise ValueError(
                f"{key!r} belongs to an adapter: call pipe.fuse_lora() and pipe.unload_lora_weights() first."
            )
        if tensor.is_meta:
            raise ValueError(f"{key!r} is offloaded: call pipe.remove_all_hooks() and pipe.to('cpu') first.")
    return {key: tensor.cpu().contiguous() for key, tensor in weights.items()}


def _text_encoder_state_dict(encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's state dict with the `text_model.` prefix, which newer versions of transformers leave out."""
    prefix, weights = "text_model.", _cpu_state_dict(encoder)
    wrapped = any(key.startswith(prefix) for key in weights)
    return weights if wrapped else {prefix + key: tensor for key, tensor in weights.items()}


def _rename_keys(weights: Mapping[str, Tensor], prefix: str, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Weights under `prefix`, renamed by `rename`; refuse a key without a name."""
    names = {key: rename(key) for key in weights}
    for key, name in names.items():
        if name is None:
            raise ValueError(f"{key!r} has no name in an original checkpoint; save a folder instead.")
    return {f"{prefix}{names[key]}": tensor for key, tensor in weights.items()}


# -- UNet

_UNET_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
_UNET_KEY = re.compile(
    r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)"
)


def _unet_key_renamer(layers: Any, keys: Iterable[str]) -> Callable[[str], str | None]:
    """A function from diffusers' to original UNet keys; the original numbers blocks and layers consecutively."""
    tables = stock.DIFFUSERS_TO_LDM_MAPPING["unet"]
    known = {**tables["layers"], **tables["addition_embed_type"]}
    attending = {key.split(".")[1] for key in keys if key.startswith("up_blocks.") and ".attentions." in key}

    def name(key: str) -> str | None:
        match = _UNET_KEY.fullmatch(key)
        if match is None or not isinstance(layers, int):
            return known.get(key)
        place, block, kind, layer, rest, leaf = match.groups()
        if kind == "resnets":
            rest = _UNET_RESNET.get(rest)
        if place == "mid":
            return f"middle_block.{2 * int(layer) + (kind == 'attentions')}.{rest}.{leaf}"
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + (block in attending)}.conv.{leaf}"
        blocks, index = ("input_blocks", first + 1) if place == "down" else ("output_blocks", first)
        return f"{blocks}.{index + int(layer)}.{int(kind == 'attentions')}.{rest}.{leaf}"

    return name


# -- autoencoder

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_KEY = re.compile(
    r"(encoder|decoder)\.(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
    r"\.(.+)\.(weight|bias)"
)


def _vae_key_renamer(blocks: int) -> Callable[[str], str | None]:
    """A function from diffusers' to original VAE keys; the original format counts decoder blocks from the image."""

    def name(key: str) -> str | None:
        match = _VAE_KEY.fullmatch(key)
        if match is None:
            return stock.DIFFUSERS_TO_LDM_MAPPING["vae"].get(key)
        side, place, block, kind, layer, rest, leaf = match.groups()
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        if place == "mid":
            if kind == "resnets":
                return f"{side}.mid.block_{int(layer) + 1}.{rest}.{leaf}"
            return f"{side}.mid.attn_1.{_VAE_ATTENTION.get(rest)}.{leaf}"
        index = int(block) if place == "down" else blocks - 1 - int(block)
        part = f"block.{layer}" if kind == "resnets" else f"{place}sample"
        return f"{side}.{place}.{index}.{part}.{rest}.{leaf}"

    return name


def _as_convolution(key: str, tensor: Tensor) -> Tensor:
    """A linear weight of the VAE's attention as the 1x1 convolution of original checkpoints; others unchanged."""
    attention = key.startswith(VAE) and ".mid.attn_1." in key and tensor.ndim == 2
    return tensor[:, :, None, None] if attention else tensor


# -- text encoders


def _rename_clip_keys(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under `prefix`; names otherwise follow transformers."""
    return {prefix + key: tensor for key, tensor in weights.items()}


def _rename_open_clip_keys(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder's weights in OpenCLIP's format: q, k, v in one matrix, the projection transposed."""
    tables = stock.DIFFUSERS_TO_LDM_MAPPING["openclip"]
    checkpoint: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = tables["layers"].get(key)
        if name is None:
            name = key
            for theirs, original in tables["transformer"].items():
                name = name.replace(theirs, original)
            name = f"transformer.{name}"
        checkpoint[prefix + name] = tensor.T.contiguous() if name == "text_projection" else tensor
    for key in [key for key in checkpoint if ".attn.q_proj." in key]:
        parts = [checkpoint.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        checkpoint[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return checkpoint

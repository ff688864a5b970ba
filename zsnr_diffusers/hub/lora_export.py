"""Write an adapter's weights to files, with diffusers' and with kohya's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..schedulers.config import is_flow
from ..utils.extras import import_extra
from ..utils.files import atomic_path
from .claims import scheduler_claim
from .header import read_header
from .layouts import SD_2, SDXL, OriginalFormat
from .ldm_format import detect_pipeline_layout
from .single_file import file_metadata, model_record
from .weight_files import prepare_for_safetensors

Weights: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By pipeline component and peft's name."""


def find_adapters(pipe: Any) -> dict[str, str]:
    """The adapter's name for each pipeline component that has one.

    Raises:
        ValueError: there is none in the UNet, or several in a component.
    """
    adapters = pipe.get_list_adapters() if hasattr(pipe, "get_list_adapters") else {}
    if "unet" not in adapters or any(len(names) != 1 for names in adapters.values()):
        found = "; ".join(f"{part}: {', '.join(names)}" for part, names in adapters.items())
        raise ValueError(
            f"Expected one adapter, in the UNet and optionally the text encoders; {type(pipe).__name__} has "
            f"{found or 'none'}."
        )
    return {part: str(names[0]) for part, names in adapters.items()}


def is_dora(pipe: Any, adapters: Mapping[str, str]) -> bool:
    """Whether one of a pipeline's adapters is a DoRA."""
    return any(getattr(pipe, part).peft_config[adapter].use_dora for part, adapter in adapters.items())


def adapter_weights(pipe: Any, part: str, adapter: str) -> dict[str, Tensor]:
    """Weights of a component's adapter by peft's names, multiplied by the adapter's strength."""
    network = getattr(pipe, part)
    weights = import_extra("peft", "lora").get_peft_model_state_dict(network, adapter_name=adapter)
    strengths = {
        f"{name}.lora_B": layer.scaling[adapter]
        for name, layer in network.named_modules()
        if adapter in getattr(layer, "scaling", ())
    }
    scaled = {
        name: _scale_weights(value.detach().cpu(), strengths.get(name.rpartition(".")[0], 1))
        for name, value in weights.items()
    }
    return prepare_for_safetensors({_published_key(part, name): value for name, value in scaled.items()})


def _published_key(part: str, name: str) -> str:
    """An adapter weight's key with the `text_model.` prefix of published files, which newer transformers omits."""
    wrapper = "" if part == "unet" or name.startswith("text_model.") else "text_model."
    return wrapper + name


def _scale_weights(weights: Tensor, strength: float) -> Tensor:
    """Weights times the adapter's strength, as float32 if half precision would round the product."""
    product = weights.double() * strength
    rounded = product.to(weights.dtype)
    lossy = weights.dtype.itemsize < 4 and not torch.equal(rounded.double(), product)
    return product.float() if lossy else rounded


def lora_metadata(pipe: Any, scheduler: Any, title: str) -> dict[str, str]:
    """Metadata of a LoRA's files: our own record, and the keys that other programs read.

    Args:
        pipe: pipeline with the LoRA and the scheduler it was trained for.
        scheduler: diffusers scheduler saved with it.
        title: of the LoRA.
    """
    record = model_record(pipe, bool(scheduler_claim(pipe.scheduler.config).rescale_betas_zero_snr))
    if not is_flow(pipe.scheduler.config):
        record["timestep_spacing"] = scheduler.config.get("timestep_spacing")
    layout = detect_pipeline_layout(pipe)
    architecture = layout.architectures.get(record["prediction_type"], layout.architectures["epsilon"])
    return file_metadata(pipe, record, f"{architecture}/lora", title) | _kohya_metadata(layout, record)


def _kohya_metadata(layout: OriginalFormat, record: Mapping[str, Any]) -> dict[str, str]:
    """kohya's metadata keys, which tell sd-scripts and Forge the base and schedule of a LoRA."""
    predicts = record["prediction_type"]
    said = {
        "ss_base_model_version": layout.bases.get(predicts, layout.bases["epsilon"]),
        "ss_v2": layout is SD_2,
    }
    if predicts == "flow_prediction":
        said["ss_discrete_flow_shift"] = record.get("shift", 1.0)
    else:
        said["ss_v_parameterization"] = predicts == "v_prediction"
        said["ss_zero_terminal_snr"] = record["rescale_betas_zero_snr"]
    return {key: str(value) for key, value in said.items()}


def write_kohya_file(path: Path, pipe: Any, weights: Weights, metadata: Mapping[str, str]) -> Path:
    """Write a LoRA with kohya's names, which differ between a single and a first text encoder."""
    named = {f"{part}.{name}": value for part, values in weights.items() for name, value in values.items()}
    theirs = convert_state_dict_to_kohya(named)
    only = "lora_te1_" if detect_pipeline_layout(pipe) is SDXL else "lora_te_"
    with atomic_path(path) as new:
        theirs = {key.replace("lora_te1_", only): value for key, value in theirs.items()}
        save_file(prepare_for_safetensors(theirs), new, dict(metadata))
    return path


def write_stock_file(
    path: Path, pipe: Any, adapters: Mapping[str, str], weights: Weights, metadata: Mapping[str, str]
) -> Path:
    """Write a LoRA with diffusers' names and writer, and additional metadata."""
    layers = {f"{part}_lora_layers": values for part, values in weights.items()}
    configs = {part: getattr(pipe, part).peft_config[adapter] for part, adapter in adapters.items()}
    said = {f"{part}_lora_adapter_metadata": _adapter_metadata(config) for part, config in configs.items()}
    with atomic_path(path) as new:
        stock = new.with_name("stock.safetensors")
        pipe.save_lora_weights(stock.parent, **layers, **said, weight_name=stock.name)
        save_file(load_file(stock), new, {**read_header(stock).metadata, **metadata})
    return path


def _adapter_metadata(config: Any) -> dict[str, Any]:
    """The part of peft's configuration that older versions support; alpha equals the rank since weights are scaled.

    Layers are matched by the end of their names, so names without the wrapper work in all versions of transformers.
    """
    targets, wrapper = config.target_modules, "text_model."
    ranks = {name.removeprefix(wrapper): rank for name, rank in config.rank_pattern.items()}
    return {
        "r": config.r,
        "lora_alpha": config.r,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": targets
        if isinstance(targets, str)
        else sorted(target.removeprefix(wrapper) for target in targets),
        "use_dora": config.use_dora,
    }

"""An adapter of the UNet, trained in place of the whole: LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et al.
2024, arXiv:2402.09353), as peft has them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ...hub.header import read_header
from ...hub.lora import save_lora
from ...hub.lora_files import lora_file
from ...hub.lora_fit import check_loads, load_weights
from ...hub.model_card import base_name, lora_usage
from ...utils.extras import import_extra
from ..parameters import trainable_parameters
from ..reporting.model_card import TrainingRecord
from .base import Base
from .config import AdapterConfig, GuidedOutputConfig
from .export import export_scheduler, write_card

_ADAPTER = "default"


def give_adapter(pipe: Any, config: AdapterConfig, seed: int) -> None:
    """Give a pipeline's UNet an adapter, beside which all is frozen.

    Args:
        pipe: the base.
        config: with the weights to start from; without, the first ones are of the seed and change nothing.
        seed: of the run.

    Raises:
        ImportError: peft is not installed.
        OSError: there are no such weights.
        ValueError: a target is no layer of the UNet; the weights are of another base, or of text encoders too.
    """
    peft = import_extra("peft", "lora")
    if config.lora_weights is None:
        _add_adapter(peft, pipe.unet, config, seed)
    else:
        _load_adapter(pipe, config.lora_weights)


def _load_adapter(pipe: Any, source: str) -> None:
    file = lora_file(source)
    adapted = check_loads(pipe, file, read_header(file), adapter_name=_ADAPTER).get_list_adapters()
    if others := sorted(set(adapted) - {"unet"}):
        raise ValueError(
            f"--lora_weights={source} changes {' and '.join(others)} too, and only the UNet is trained here: pass "
            "a LoRA of the UNet alone."
        )
    load_weights(pipe, file, adapter_name=_ADAPTER)
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _add_adapter(peft: Any, unet: UNet2DConditionModel, config: AdapterConfig, seed: int) -> None:
    _check_targets(unet, config.lora_target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            peft.LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha or config.lora_rank,
                use_dora=config.use_dora,
                target_modules=config.lora_target_modules,
            )
        )


def _check_targets(unet: nn.Module, targets: list[str]) -> None:
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            # A number alone, as in to_out.0, says nothing.
            known = {".".join(name.rsplit(".", 2)[-2 if name[-1].isdigit() else -1 :]) for name in layers}
            raise ValueError(
                f"--lora_target_modules: the UNet has no layer {target!r}; choose of {', '.join(sorted(known))}."
            )


def described(unet: nn.Module, config: AdapterConfig) -> str:
    """The adapter of a UNet in words."""
    parameters = sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    if config.lora_weights:
        return f"{_kind(unet)} from {config.lora_weights}, {parameters:,} parameters"
    strength = f"rank {config.lora_rank}, alpha {config.lora_alpha or config.lora_rank:g}"
    return f"{_kind(unet)} of {strength}, {parameters:,} parameters, on {' '.join(config.lora_target_modules)}"


def _is_dora(unet: Any) -> bool:
    return bool(unet.peft_config[_ADAPTER].use_dora)


def _kind(unet: Any) -> str:
    return "DoRA" if _is_dora(unet) else "LoRA"


def save_lora_folder(base: Base, pipe: Any, config: GuidedOutputConfig, adapter: str, record: TrainingRecord) -> None:
    """Write the trained adapter into the run's folder, with scheduler and model card.

    Args:
        base: that the adapter is of.
        pipe: with the adapter, and the scheduler and the guidance rescale to recommend.
        config: with the folder and the guidance to recommend.
        adapter: in words.
        record: of its training.
    """
    of = base_name(base.config.pretrained_model_name_or_path)
    data = {"tags": [base.architecture.tag, "lora"], "base_model_relation": "adapter"}
    guidance = {"guidance_scale": config.guidance_scale, "guidance_rescale": config.guidance_rescale}
    folder, dora = Path(config.output_dir).resolve().name, _is_dora(pipe.unet)
    scheduler = export_scheduler(base)
    usage = lora_usage(of, folder, scheduler, guidance, dora)
    rows = {"adapter": adapter, "recommended guidance rescale": str(config.guidance_rescale)}
    write_card(base, scheduler, record, f"{_kind(pipe.unet)} of {of}", rows, usage, **data)
    # Last: a folder without it is not taken for a result.
    save_lora(pipe, config.output_dir)

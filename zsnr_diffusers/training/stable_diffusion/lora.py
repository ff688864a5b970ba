"""An adapter that is trained instead of the complete UNet: LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et
al. 2024, arXiv:2402.09353), as peft has them.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ...hub.header import read_header
from ...hub.lora import save_lora
from ...hub.lora_files import find_lora_file
from ...hub.lora_fit import check_lora_loads, load_lora_file
from ...hub.model_card import lora_usage, public_base_name
from ...utils.extras import import_extra
from ..parameters import trainable_parameters
from ..reporting.model_card import TrainingRecord
from .base import Base
from .config import AdapterConfig, GuidedOutputConfig
from .export import export_scheduler, kept_low_frequencies, recommended_guidance_rows, write_model_card

_ADAPTER = "default"


def prepare_adapter(pipe: Any, config: AdapterConfig, seed: int) -> None:
    """Give a pipeline's UNet the adapter to train, and freeze everything else.

    Args:
        pipe: the base.
        config: with the weights to start from; without, the first ones are of the seed and change nothing.
        seed: of the run.

    Raises:
        ImportError: peft is not installed.
        OSError: the weights do not exist.
        ValueError: a target is not a layer of the UNet; the weights are for another base, or also for text encoders.
    """
    peft = import_extra("peft", "lora")
    if config.lora_weights is None:
        _add_adapter(peft, pipe.unet, config, seed)
    else:
        _load_adapter(pipe, config.lora_weights)


def _load_adapter(pipe: Any, source: str) -> None:
    """Load `--lora_weights` into a pipeline's UNet as its trainable adapter."""
    file = find_lora_file(source)
    adapted = check_lora_loads(pipe, file, read_header(file), adapter_name=_ADAPTER).get_list_adapters()
    if others := sorted(set(adapted) - {"unet"}):
        raise ValueError(
            f"--lora_weights={source} changes {' and '.join(others)} too, but only the UNet is trained here: pass a "
            "LoRA of only the UNet."
        )
    load_lora_file(pipe, file, adapter_name=_ADAPTER)
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _add_adapter(peft: Any, unet: UNet2DConditionModel, config: AdapterConfig, seed: int) -> None:
    """Add a new LoRA or DoRA to a UNet, initialized from the run's seed."""
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
    """Refuse `--lora_target_modules` that match no layer of the UNet."""
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            # A number alone, as in to_out.0, says nothing.
            known = {".".join(name.rsplit(".", 2)[-2 if name[-1].isdigit() else -1 :]) for name in layers}
            raise ValueError(
                f"--lora_target_modules: the UNet has no layer {target!r}; choose from {', '.join(sorted(known))}."
            )


def describe_adapter(unet: nn.Module, config: AdapterConfig) -> str:
    """A UNet's trained adapter in words: kind, rank or source, parameters, layers."""
    parameters = sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    if config.lora_weights:
        return f"{_adapter_kind(unet)} from {config.lora_weights}, {parameters:,} parameters"
    strength = f"rank {config.lora_rank}, alpha {config.lora_alpha or config.lora_rank:g}"
    return f"{_adapter_kind(unet)} of {strength}, {parameters:,} parameters, on {' '.join(config.lora_target_modules)}"


def _is_dora(unet: Any) -> bool:
    return bool(unet.peft_config[_ADAPTER].use_dora)


def _adapter_kind(unet: Any) -> str:
    """ "LoRA" or "DoRA", whichever a UNet's adapter is."""
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
    of = public_base_name(base.config.pretrained_model_name_or_path)
    data = {"tags": [base.architecture.tag, "lora"], "base_model_relation": "adapter"}
    folder, dora = Path(config.output_dir).resolve().name, _is_dora(pipe.unet)
    scheduler = export_scheduler(base)
    usage = lora_usage(of, folder, scheduler, config.recommended_call(), dora)
    rows = {"adapter": adapter, **recommended_guidance_rows(config, kept_low_frequencies(base, config))}
    write_model_card(base, scheduler, record, f"{_adapter_kind(pipe.unet)} of {of}", rows, usage, **data)
    # Last: a folder without it is not taken for a result.
    save_lora(pipe, config.output_dir)

"""LoRA files that say what schedule their weights are for, out of a pipeline and into one.

A LoRA that was trained to predict v on zero terminal SNR paints noise with the scheduler of its base, and nothing in
diffusers' format says so. So it is written beside the weights: as metadata of the file, and as a scheduler.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_kohya, logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._extras import import_extra
from .checkpoint_layout import layout_of_pipeline
from .core.guidance import check_guidance_rescale
from .guidance import with_guidance
from .hub import check_zero_snr, scheduler_with_facts
from .model_facts import find_model_facts, is_single_file, scheduler_claim
from .single_file import file_metadata, model_record, read_header
from .stock_scheduler import stock_scheduler

logger = logging.get_logger(__name__)

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
_PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_lora(
    pipe: Any,
    source: Any,
    *,
    weight_name: str = LORA_FILE,
    guidance_rescale: float | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a LoRA or DoRA into a pipeline by diffusers' own loader, with the schedule that it was trained on.

    What it makes the network predict, and whether its schedule ends in pure noise, stands in the metadata of the file:
    that of `save_lora` and of the trainer, ModelSpec's, or kohya's. A scheduler of the pipeline that does this rightly
    stays, another one is replaced as `load_pipeline` does; `pipe.unload_lora_weights()` does not bring it back.

    Args:
        pipe: a pipeline of the LoRA's base.
        source: a folder, a Hub id, or a `.safetensors` file.
        weight_name: the file in a folder or Hub repo.
        guidance_rescale: phi instead of what is recorded; 0 for none.
        prediction_type: instead of what is found.
        rescale_betas_zero_snr: likewise.
        kwargs: of `pipe.load_lora_weights`, such as `adapter_name`, and where to look: `subfolder`, `revision`, ...

    Returns:
        The same pipeline.

    Raises:
        ValueError: the file does not say what the network predicts with it, and neither do the arguments; zero SNR of
            a model that predicts epsilon; phi outside [0, 1]; a damaged file.
        OSError: there is no such file.
        TypeError: the pipeline takes no LoRA, or no guidance rescale.
        ImportError: peft is not installed.
    """
    check_guidance_rescale(guidance_rescale or 0.0)
    import_extra("peft", "lora")
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"{type(pipe).__name__} has no load_lora_weights.")
    places = {key: kwargs.pop(key) for key in _PLACES if key in kwargs}
    file = _file_of(source, weight_name, places)
    facts = find_model_facts(file, prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr)
    if facts.prediction_type is None:
        raise ValueError(
            f"{file} does not say what the network predicts with it: pass prediction_type= and "
            "rescale_betas_zero_snr= as it was trained. If it is for the schedule that the pipeline has, "
            "pipe.load_lora_weights leaves that alone."
        )
    check_zero_snr(file, facts)
    for conflict in facts.conflicts:
        logger.warning(f"{file}: {conflict}")
    scheduler = scheduler_with_facts(pipe, facts)
    # The path of the file alone would have older diffusers ask the Hub for its name.
    pipe.load_lora_weights(os.fspath(file.parent), weight_name=file.name, **kwargs)
    pipe.scheduler = scheduler
    pipe = with_guidance(pipe, facts.guidance, guidance_rescale)
    phi = getattr(pipe, "default_guidance_rescale", 0.0)
    logger.info(f"{file}: {facts}; sampled by {type(scheduler).__name__}, guidance rescale {phi:g}.")
    return pipe


def _file_of(source: Any, weight_name: str, places: dict[str, Any]) -> Path:
    if is_single_file(source):
        return Path(source)
    if (folder := Path(source)).is_dir():
        file = folder / (places.get("subfolder") or "") / weight_name
        if not file.is_file():
            found = sorted(path.name for path in file.parent.glob("*.safetensors"))
            raise FileNotFoundError(f"There is no {file}; pass weight_name=, one of {', '.join(found) or 'nothing'}.")
        return file
    try:
        return Path(hf_hub_download(os.fspath(source), weight_name, **places))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{source} has no {weight_name} on the Hub; pass weight_name=.") from error


def save_lora(pipe: Any, folder: Any) -> Path:
    """Save the adapter of a pipeline's UNet, and what whoever applies it has to know, as the pipeline has it now.

    In the folder are then `pytorch_lora_weights.safetensors`, which `load_lora_weights` of stock opens; a scheduler of
    stock, in `scheduler/`; and of a LoRA that is no DoRA `kohya_lora_weights.safetensors`, with the names by which
    ComfyUI and others know layers. Schedule, prediction type and guidance rescale stand in the metadata of both files.

    The strength of the adapter, alpha / rank, is multiplied into its weights: not all who read diffusers' format find
    it elsewhere.

    Args:
        pipe: with one adapter, in its UNet; its scheduler and `default_guidance_rescale` are recorded.
        folder: made if need be; files of these names are replaced.

    Returns:
        The folder.

    Raises:
        ValueError: the pipeline has no adapter, several, or one elsewhere; its scheduler is of no variance-preserving
            schedule, or no scheduler of stock stands in for it.
    """
    folder, adapter = Path(folder), _only_adapter(pipe)
    claim = scheduler_claim(pipe.scheduler.config)
    record = model_record(pipe, bool(claim.rescale_betas_zero_snr))
    scheduler = stock_scheduler(pipe.scheduler)
    weights = _weights(pipe.unet, adapter)
    config = pipe.unet.peft_config[adapter]
    architectures = layout_of_pipeline(pipe).architectures
    architecture = architectures.get(record["prediction_type"], architectures["epsilon"])
    record["timestep_spacing"] = scheduler.config.get("timestep_spacing")
    metadata = file_metadata(pipe, record, f"{architecture}/lora", folder.resolve().name) | _kohya_metadata(record)
    scheduler.save_pretrained(folder / "scheduler")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora.") as room:
        new = Path(room, "new.safetensors")
        if not config.use_dora:
            prefixed = {f"unet.{name}": value for name, value in weights.items()}
            save_file(convert_state_dict_to_kohya(prefixed), new, metadata)
            new.replace(folder / KOHYA_FILE)
        pipe.save_lora_weights(room, weights, unet_lora_adapter_metadata=_adapter_metadata(config))
        written = Path(room, LORA_FILE)
        save_file(load_file(written), new, read_header(written).metadata | metadata)
        new.replace(folder / LORA_FILE)
    return folder


def _only_adapter(pipe: Any) -> str:
    adapters = pipe.get_list_adapters() if hasattr(pipe, "get_list_adapters") else {}
    if [*adapters] != ["unet"] or len(adapters["unet"]) != 1:
        found = "; ".join(f"{part}: {', '.join(names)}" for part, names in adapters.items())
        raise ValueError(f"Expected one adapter, in the UNet; {type(pipe).__name__} has {found or 'none'}.")
    return str(adapters["unet"][0])


def _weights(unet: Any, adapter: str) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, their strength multiplied in."""
    weights = import_extra("peft", "lora").get_peft_model_state_dict(unet, adapter_name=adapter)
    strengths = {
        f"{name}.lora_B": layer.scaling[adapter]
        for name, layer in unet.named_modules()
        if adapter in getattr(layer, "scaling", ())
    }
    scaled = {name: value * strengths.get(name.rpartition(".")[0], 1) for name, value in weights.items()}
    return {name: value.detach().cpu().contiguous() for name, value in scaled.items()}


def _adapter_metadata(config: Any) -> dict[str, Any]:
    """Of peft's configuration what older versions know too; alpha is the rank, since it is in the weights."""
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.r,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.rank_pattern,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_dora": config.use_dora,
    }


def _kohya_metadata(record: dict[str, Any]) -> dict[str, str]:
    said = {
        "ss_v_parameterization": record["prediction_type"] == "v_prediction",
        "ss_zero_terminal_snr": record["rescale_betas_zero_snr"],
    }
    return {key: str(value) for key, value in said.items()}

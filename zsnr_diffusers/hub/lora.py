"""LoRA files that say what schedule their weights are for, out of a pipeline and into one.

A LoRA that was trained to predict v on zero terminal SNR generates noise with the scheduler of its base, and nothing
in diffusers' format says so. So it is written beside the weights: as metadata of the file, and as a scheduler.
"""

from pathlib import Path
from typing import Any

from diffusers.utils import logging

from ..core.choices import check_guidance_rescale, check_keep_low_frequencies
from ..guidance.mixin import apply_guidance
from ..utils.extras import import_extra
from .files import HUB_KWARGS, SCHEDULER_CONFIG, error_context, hub_kwargs_of
from .flow_models import stock_scheduler_for
from .load import check_epsilon, scheduler_for
from .lora_export import adapter_weights, find_adapters, is_dora, lora_metadata, write_kohya_file, write_stock_file
from .lora_files import KOHYA_FILE, LORA_FILE, find_lora_file
from .lora_fit import check_lora_loads, load_lora_file
from .model_card import lora_card
from .save import check_file_name
from .saved_model import SavedModel
from .upload import create_repo, upload

logger = logging.get_logger(__name__)


def load_lora(
    pipe: Any,
    source: Any,
    *,
    weight_name: str = LORA_FILE,
    guidance_rescale: float | None = None,
    keep_low_frequencies: int | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a LoRA or DoRA into a pipeline with diffusers' loader, together with the schedule it was trained on.

    What it makes the network predict, and whether its schedule ends in pure noise, stands in the metadata of the file:
    that of `save_lora` and of the trainer, ModelSpec's, or kohya's. A scheduler of the pipeline that does this
    correctly stays, another one is replaced as `load_pipeline` does; `pipe.unload_lora_weights()` does not bring
    it back.

    Args:
        pipe: a pipeline of the LoRA's base.
        source: a folder, a Hub id, or a `.safetensors` file; or one of them as a `SavedModel`.
        weight_name: the file in a folder or Hub repo; a `SavedModel` is of one file already.
        guidance_rescale: phi instead of what is recorded; 0 for none.
        keep_low_frequencies: k instead of what is recorded; 0 for none. See `enable_guidance_rescale`.
        prediction_type: instead of what is found.
        rescale_betas_zero_snr: likewise.
        kwargs: of `pipe.load_lora_weights`, such as `adapter_name`, and where to look: `subfolder`, `revision`, ...

    Returns:
        The same pipeline.

    Raises:
        ValueError: the file does not say what the network predicts with it, and neither do the arguments; zero SNR of
            a model that predicts epsilon, by the file or by file and pipeline together; phi outside [0, 1]; k no
            count; a damaged file; one of which not all is read or not all layers are in the pipeline. The pipeline is
            then as it was.
        OSError: there is no such file, or the Hub refuses it, with the reason.
        TypeError: the pipeline takes no LoRA, or has no guidance for phi or k.
        ImportError: peft is not installed.
    """
    check_guidance_rescale(guidance_rescale or 0.0)
    check_keep_low_frequencies(keep_low_frequencies or 0)
    import_extra("peft", "lora")
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"{type(pipe).__name__} has no load_lora_weights.")
    places = {key: kwargs.pop(key) for key in (*HUB_KWARGS, "subfolder") if key in kwargs}
    told: dict[str, Any] = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    saved = SavedModel.open(source, weight_name=weight_name, **told, **places)
    file = saved.weights or find_lora_file(saved.name, **hub_kwargs_of(saved.options, "subfolder"))
    if saved.prediction_type is None:
        raise ValueError(
            f"{file} does not say what the network predicts with it: pass prediction_type= and "
            "rescale_betas_zero_snr= as it was trained. If it is for the schedule that the pipeline has, "
            "pipe.load_lora_weights leaves that alone."
        )
    check_epsilon(saved)
    for conflict in saved.conflicts:
        logger.warning(f"{file}: {conflict}")
    with error_context(file):
        scheduler = scheduler_for(pipe, saved)
    guidance = saved.guidance, guidance_rescale, keep_low_frequencies
    # What fails, fails here, where the pipeline is as it was.
    apply_guidance(check_lora_loads(pipe, file, saved.header, **kwargs), *guidance)
    load_lora_file(pipe, file, **kwargs)
    pipe.scheduler = scheduler
    pipe = apply_guidance(pipe, *guidance)
    phi, k = getattr(pipe, "default_guidance_rescale", 0.0), getattr(pipe, "default_keep_low_frequencies", 0)
    kept = f", lowest {k} x {k} frequencies kept" if k else ""
    logger.info(f"{file}: {saved.facts}; sampled by {type(scheduler).__name__}, guidance rescale {phi:g}{kept}.")
    return pipe


def save_lora(
    pipe: Any,
    path: Any,
    *,
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> Path:
    """Save the adapter of a pipeline together with its schedule, prediction type and guidance.

    In a folder are then `pytorch_lora_weights.safetensors`, which `load_lora_weights` of stock opens; a scheduler of
    stock, in `scheduler/`; and of a LoRA that is no DoRA `kohya_lora_weights.safetensors`, with the names by which
    ComfyUI, Forge, InvokeAI and sd-scripts know layers. A path that ends in `.safetensors` becomes a file with these
    names alone. Schedule, prediction type and guidance stand in the metadata of all files.

    The strength of the adapter, alpha / rank, is multiplied into its weights: not all who read diffusers' format find
    it elsewhere. Weights keep their dtype unless the product would be rounded there; then they become float32.

    Args:
        pipe: with one adapter, in its UNet and maybe its text encoders; its scheduler, `default_guidance_rescale` and
            `default_keep_low_frequencies` are recorded.
        path: a folder, made if need be, or a file; files of these names are replaced.
        push_to_hub: id of a Hub repo, which is made if need be, and whether it can be written is found out before
            anything is saved. It gets the files named above, in one commit, and a model card unless it has one.
        private: whether a new repo is.
        token: in place of the one that is logged in.
        commit_message: in place of one that names what was saved.

    Returns:
        The path.

    Raises:
        OSError: the Hub refuses; if what is saved is on the disk already, it stays, and the message says so.
        ValueError: the pipeline has no adapter, or several; a DoRA for a file of kohya's names; its scheduler is of
            neither a variance-preserving schedule nor flow matching, or no scheduler of stock stands in for it.
    """
    path = Path(path)
    check_file_name(path)
    adapters = find_adapters(pipe)
    one_file, dora, scheduler = path.suffix == ".safetensors", is_dora(pipe, adapters), stock_scheduler_for(pipe)
    if one_file and dora:
        raise ValueError(f"{path}: kohya's names have no place for a DoRA; save it to a folder instead.")
    weights = {part: adapter_weights(pipe, part, adapter) for part, adapter in adapters.items()}
    metadata = lora_metadata(pipe, scheduler, path.stem if one_file else path.resolve().name)
    repo = None if push_to_hub is None else create_repo(push_to_hub, private, token)
    if one_file:
        written = [write_kohya_file(path, pipe, weights, metadata)]
    else:
        scheduler.save_pretrained(path / "scheduler")
        written = [path / "scheduler" / SCHEDULER_CONFIG]
        if not dora:
            written.append(write_kohya_file(path / KOHYA_FILE, pipe, weights, metadata))
        # Last: a folder without it is not taken for a LoRA.
        written.append(write_stock_file(path / LORA_FILE, pipe, adapters, weights, metadata))
    if repo is not None:
        upload(path, repo, lora_card(pipe, path, repo, dora), token, commit_message, written)
    return path

"""Save and load LoRAs together with the schedule they were trained on.

A LoRA that was trained with v-prediction at zero terminal SNR generates noise with its base's scheduler, and
diffusers' format does not record this. It is therefore saved with the weights: in the file's metadata, and as a
scheduler.
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

    The file's metadata records the prediction type and whether the schedule ends in pure noise: metadata of
    `save_lora` and the trainer, of ModelSpec, or of kohya. If the pipeline's scheduler does not match, it is replaced
    as in `load_pipeline`; `pipe.unload_lora_weights()` does not restore it.

    Args:
        pipe: a pipeline of the LoRA's base.
        source: a folder, a Hub id, a `.safetensors` file, or a `SavedModel`.
        weight_name: the file in a folder or Hub repo; not needed for a `SavedModel`.
        guidance_rescale: overrides the recorded value; 0 for none.
        keep_low_frequencies: overrides the recorded value; 0 for none. See `enable_guidance_rescale`.
        prediction_type: overrides the detected value.
        rescale_betas_zero_snr: overrides the detected value.
        kwargs: for `pipe.load_lora_weights`, such as `adapter_name`, and Hub arguments such as `subfolder` or
            `revision`.

    Returns:
        The same pipeline.

    Raises:
        ValueError: neither the file nor the arguments give the prediction type; zero SNR with epsilon-prediction, by
            the file alone or together with the pipeline; guidance_rescale outside [0, 1]; an invalid
            keep_low_frequencies; a damaged file; a file that diffusers reads only in part, or with layers that the
            pipeline lacks. The pipeline is then unchanged.
        OSError: the file was not found, or a Hub error, with the cause.
        TypeError: the pipeline does not support LoRA, or has no guidance to set.
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
            f"{file} does not record its prediction type: pass prediction_type= and rescale_betas_zero_snr= as it was "
            "trained. If it was trained on the pipeline's schedule, use pipe.load_lora_weights, which keeps the "
            "scheduler."
        )
    check_epsilon(saved)
    for conflict in saved.conflicts:
        logger.warning(f"{file}: {conflict}")
    with error_context(file):
        scheduler = scheduler_for(pipe, saved)
    guidance = saved.guidance, guidance_rescale, keep_low_frequencies
    # Errors are raised here, before the pipeline is changed.
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

    A folder contains `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_weights`; a diffusers scheduler in
    `scheduler/`; and, unless it is a DoRA, `kohya_lora_weights.safetensors`, with the layer names of ComfyUI, Forge,
    InvokeAI and sd-scripts. A path that ends in `.safetensors` becomes a single file with these names. The metadata of
    all files records schedule, prediction type and guidance.

    The adapter's strength, alpha / rank, is multiplied into its weights, because some readers of diffusers' format
    ignore it. Weights keep their dtype unless the product would be rounded; then they become float32.

    Args:
        pipe: with one adapter, in its UNet and optionally its text encoders; its scheduler, `default_guidance_rescale`
            and `default_keep_low_frequencies` are recorded.
        path: a folder, created if necessary, or a file; existing files with these names are replaced.
        push_to_hub: id of a Hub repo, created if necessary. Write access is checked before anything is saved. The
            files above are uploaded in one commit, with a model card unless the repo has one.
        private: whether a new repo is private.
        token: instead of the stored login.
        commit_message: instead of the default.

    Returns:
        The path.

    Raises:
        OSError: a Hub error; files that were already saved are kept, and the message says so.
        ValueError: the pipeline has no adapter, or several; a DoRA cannot be saved with kohya's names; the scheduler
            is neither variance-preserving nor flow-matching, or has no equivalent in diffusers.
    """
    path = Path(path)
    check_file_name(path)
    adapters = find_adapters(pipe)
    one_file, dora, scheduler = path.suffix == ".safetensors", is_dora(pipe, adapters), stock_scheduler_for(pipe)
    if one_file and dora:
        raise ValueError(f"{path}: kohya's format cannot store a DoRA; save it to a folder instead.")
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
        # Last: a folder without it is not recognized as a LoRA.
        written.append(write_stock_file(path / LORA_FILE, pipe, adapters, weights, metadata))
    if repo is not None:
        upload(path, repo, lora_card(pipe, path, repo, dora), token, commit_message, written)
    return path

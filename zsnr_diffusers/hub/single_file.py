"""Write a pipeline as a single file, with the names and metadata that other programs understand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import save_file

from ..core.choices import check_prediction_type
from ..guidance.record import record_of_pipeline
from ..schedulers import FlowMatchMultistepScheduler
from ..schedulers.config import FLOW_FACTS, flow_model_config, is_flow, model_config
from .weight_files import prepare_for_safetensors

logger = logging.get_logger(__name__)

RECORD = "zsnr_diffusers"
"""The metadata entry for schedule and guidance, which these layouts cannot store otherwise, as JSON."""

_DETAILS = {
    "clip_sample": ("clip_sample_range",),
    "thresholding": ("dynamic_thresholding_ratio", "sample_max_value"),
}
"""Settings without effect if another one is off."""

SD_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "snr_shift_scale": 1.0,
}


def write_single_file(pipe: Any, path: Path, prediction_type: str | None, zero_snr: bool) -> None:
    """Write a Stable Diffusion pipeline as one file in the original layout; see `save_pipeline`.

    Args:
        pipe: the pipeline.
        path: path of the file; its name without the extension becomes the title.
        prediction_type: of the network.
        zero_snr: whether the model was trained at zero terminal SNR.

    Raises:
        ValueError: readers of such files do not support the prediction type, or the components fit no layout.
    """
    # diffusers' conversions import transformers; code that only reads a header does not wait for it.
    from .ldm_format import detect_pipeline_layout, original_checkpoint

    layout, flow = detect_pipeline_layout(pipe), prediction_type == "flow_prediction"
    if not flow and (prediction_type is None or prediction_type not in layout.architectures):
        raise ValueError(
            f"Readers of single files support models that predict {' or '.join(layout.architectures)}, not "
            f"prediction_type={prediction_type!r}; save a folder instead."
        )
    if flow:
        logger.warning(
            "load_pipeline recognizes the file as flow matching; other programs treat it as an epsilon model unless "
            "configured, in ComfyUI with the node ModelSamplingSD3."
        )
    else:
        check_prediction_type(str(prediction_type), zero_snr)
    record = model_record(pipe, zero_snr)
    foreign = [f"{key}={record[key]!r}" for key, value in SD_BETAS.items() if record.get(key, value) != value]
    if foreign:
        logger.warning(
            f"{', '.join(foreign)}: load_pipeline reads this from the file; other programs assume Stable Diffusion's "
            "betas."
        )
    if getattr(pipe, "default_start", None) is not None:
        logger.warning(
            f"{path.name} cannot contain the start: save it separately with pipe.default_start.save(path), and enable "
            "it after loading."
        )
    keys = {"v_pred": prediction_type == "v_prediction", "ztsnr": zero_snr}  # empty, as other programs write them
    save_file(
        prepare_for_safetensors(
            original_checkpoint(pipe) | {key: torch.empty(0) for key, marked in keys.items() if marked}
        ),
        path,
        file_metadata(pipe, record, layout.architectures["epsilon" if flow else str(prediction_type)], path.stem),
    )


def model_record(pipe: Any, zero_snr: bool) -> dict[str, Any]:
    """The record of a model in its weights file: schedule, prediction type, guidance.

    Raises:
        ValueError: the scheduler is neither variance-preserving nor flow-matching.
    """
    if is_flow(pipe.scheduler.config):
        return flow_record(pipe.scheduler.config) | record_of_pipeline(pipe)
    facts = model_config(pipe.scheduler.config)
    idle = {detail for switch, details in _DETAILS.items() if not facts.get(switch) for detail in details}
    record = {key: value for key, value in facts.items() if key not in idle} | {"rescale_betas_zero_snr": zero_snr}
    return record | record_of_pipeline(pipe)


def flow_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Config values of a flow-matching model for a file's record, without those that equal the defaults."""
    facts = {"prediction_type": "flow_prediction", **flow_model_config(config)}
    usual = FlowMatchMultistepScheduler().config
    said = [key for key in FLOW_FACTS if key in facts and (key == "prediction_type" or facts[key] != usual[key])]
    return {key: facts[key] for key in said}


def file_metadata(pipe: Any, record: Mapping[str, Any], architecture: str, title: str) -> dict[str, str]:
    """safetensors metadata of a weights file: our own record, and ModelSpec's keys for other programs.

    Args:
        pipe: the pipeline with these weights.
        record: from `model_record`.
        architecture: ModelSpec's name of the architecture.
        title: of the model.
    """
    predicts = record["prediction_type"]
    modelspec = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "prediction_type": "v" if predicts == "v_prediction" else predicts,
    }
    if isinstance(side := pipe.unet.config["sample_size"], int):
        modelspec["resolution"] = f"{side * pipe.vae_scale_factor}x{side * pipe.vae_scale_factor}"
    spec = {f"modelspec.{key}": value for key, value in modelspec.items()}
    return {"format": "pt", RECORD: json.dumps(record), **spec}

"""Save a run's result: a pipeline with diffusers' classes that samples correctly without this package, and its model
card.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
from diffusers import SchedulerMixin, UNet2DConditionModel

from ...core.choices import DEFAULT_KEEP_LOW_FREQUENCIES
from ...guidance.record import guidance_record
from ...hub.custom_pipeline import custom_pipeline_source
from ...hub.model_card import guidance_rows, other_samplers_text, public_base_name
from ...hub.weight_files import copy_in_float32
from ...schedulers import FlowMatchMultistepScheduler
from ...schedulers.flow import FlowMatchScheduler
from ...schedulers.sampling import PathSampler
from ...schedulers.stock import stock_flow_scheduler, stock_scheduler
from ...start.start import RECORDED_START
from ..reporting.model_card import TrainingRecord, training_model_card
from .base import Base, base_folder
from .config import GuidanceConfig, GuidedOutputConfig


def export_scheduler(base: Base) -> SchedulerMixin:
    """The stock scheduler that a trained pipeline is saved with.

    For zero terminal SNR it is that of `stock_scheduler`. Without, it is the base's own with the new prediction type.
    Of a flow model it is that of `stock_flow_scheduler`.
    """
    if isinstance(base.schedule, FlowMatchScheduler):
        return stock_flow_scheduler(base.schedule)
    schedule, own = base.schedule.config, base.pipeline.scheduler
    if schedule["rescale_betas_zero_snr"]:
        return stock_scheduler(base.schedule)
    facts = {key: schedule[key] for key in ("prediction_type", "rescale_betas_zero_snr") if key in own.config}
    return stock_scheduler(own, **facts)


def kept_low_frequencies(base: Base, config: GuidanceConfig) -> int:
    """How many low frequencies a trained model's guidance keeps: as configured, or derived from the schedule.

    On a schedule that leaks brightness, guidance makes up for what the leak takes away, and keeping would undo that.
    """
    if config.keep_low_frequencies is not None:
        return config.keep_low_frequencies
    return DEFAULT_KEEP_LOW_FREQUENCIES if base.schedule.config.get("rescale_betas_zero_snr") else 0


def save_pipeline_folder(
    base: Base, unet: UNet2DConditionModel, config: GuidedOutputConfig, record: TrainingRecord
) -> None:
    """Write the trained pipeline into the run's folder.

    Only the UNet and the scheduler are new. The frozen parts are copied byte for byte, since a tokenizer that one
    version of transformers saves may not open in another; weights in half precision become float32, which the UNet
    is in, so that the pipeline opens in one dtype. `pipeline.py`, for people who do not have this package, applies the
    guidance that is recommended, and of a flow model brings the sampler that `load_pipeline` takes.
    """
    folder = Path(config.output_dir)
    scheduler = export_scheduler(base)
    flow = isinstance(base.schedule, FlowMatchScheduler)
    sampler = FlowMatchMultistepScheduler.from_config(scheduler.config) if flow else None
    with base_folder(base, folder) as (source, index):
        for part, entry in index.items():
            if part not in ("unet", "scheduler") and isinstance(entry, list) and (source / part).is_dir():
                copy_in_float32(source / part, folder / part, base.variant)
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    subject = public_base_name(base.config.pretrained_model_name_or_path)
    k = kept_low_frequencies(base, config)
    rows = recommended_guidance_rows(config, k)
    write_model_card(base, scheduler, record, subject, rows, _usage_section(config, k, scheduler, sampler))
    guidance = guidance_record(config.guidance_rescale, keep_low_frequencies=k)
    changes = {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", type(unet).__name__],
        "_diffusers_version": diffusers.__version__,
        **guidance,
    }
    # A start of the base is for its own schedule, and is not in the new folder.
    index = {key: value for key, value in index.items() if key not in ("_name_or_path", RECORDED_START)} | changes
    if guidance or sampler is not None:
        code = custom_pipeline_source(
            type(base.pipeline),
            config.guidance_rescale,
            default_keep_low_frequencies=k,
            sampler=sampler,
        )
        (folder / "pipeline.py").write_text(code, encoding="utf-8")
    # Last: a folder without it is not taken for a pipeline.
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def recommended_guidance_rows(config: GuidanceConfig, k: int) -> dict[str, str]:
    """Rows of a trained model's card on the guidance to sample it with; the rescale also if it is 0."""
    rescale = {"recommended guidance rescale": str(config.guidance_rescale)}
    return rescale | guidance_rows(0.0, k)


def write_model_card(
    base: Base,
    scheduler: SchedulerMixin,
    record: TrainingRecord,
    subject: str,
    rows: Mapping[str, str],
    usage: str,
    **data: Any,
) -> None:
    """Write a trained model's card, `README.md`, into the run's folder.

    Args:
        base: that was trained.
        scheduler: the saved one.
        record: of the training.
        subject: what was trained.
        rows: more of the table, by name.
        usage: Markdown, from the code on.
        data: more of the metadata.
    """
    name = base.config.pretrained_model_name_or_path
    facts = {"base_model": None if Path(name).exists() else name, "tags": [base.architecture.tag], **data}
    card_data = huggingface_hub.ModelCardData(pipeline_tag="text-to-image", **facts)
    text = training_model_card(record, base.schedule, scheduler, card_data, subject, rows, usage)
    (record.folder / "README.md").write_text(text, encoding="utf-8")


def _usage_section(config: GuidedOutputConfig, k: int, scheduler: SchedulerMixin, sampler: PathSampler | None) -> str:
    """Usage section of a trained pipeline's model card."""
    usage = f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{Path(config.output_dir).name}")
image = pipe("...", guidance_scale={config.guidance_scale}, guidance_rescale={config.guidance_rescale}).images[0]
```

"""
    does = [] if sampler is None else [f"samples by `{type(sampler).__name__}`"]
    does += ["applies the rescale"] if config.guidance_rescale > 0 else []
    does += [f"keeps the lowest {k} x {k} frequencies"] if k > 0 else []
    if does:
        usage += f"""\
`zsnr_diffusers.load_pipeline`, or `custom_pipeline=` with the `pipeline.py` in this repo,
{" and ".join(does)} automatically.
"""
    return usage + other_samplers_text(scheduler)

"""The model card of what a run ships."""

from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from diffusers import SchedulerMixin

from ...hub.model_card import card_text, schedule_rows, schedule_tags, terminal_snr
from ...schedulers.base import ZeroSNRScheduler
from ..config import RunConfig


def _loss(config: RunConfig) -> str:
    weight = "weight 1 at every timestep"
    if config.loss_weighting != "constant":
        gamma = f" with gamma {config.snr_gamma:g}" if "min_snr" in config.loss_weighting else ""
        weight = f"weights `{config.loss_weighting}`{gamma}"
    offset = f", noise offset {config.noise_offset:g}" if config.noise_offset else ""
    return f"mean squared error of `{config.prediction_type}`, {weight}{offset}"


def model_card(
    config: RunConfig,
    schedule: ZeroSNRScheduler,
    scheduler: SchedulerMixin,
    data: huggingface_hub.ModelCardData,
    subject: str,
    rows: Mapping[str, str],
    usage: str,
) -> str:
    """What a sampler needs to know: schedule, prediction type, spacing; and how to sample.

    Args:
        config: of the run.
        schedule: trained on.
        scheduler: shipped.
        data: metadata, to which the tags of the schedule are added.
        subject: what was trained.
        rows: more of the table, by name.
        usage: Markdown, from the code on.
    """
    data.library_name = "diffusers"
    data.tags = [*(data.tags or []), *schedule_tags(schedule)]
    zero = terminal_snr(schedule) == 0
    ending = "the schedule of Lin et al. 2023 (arXiv:2305.08891), ending at pure noise" if zero else "its own schedule"
    text = f"{subject}, trained for {config.max_train_steps:,} steps with zsnr_diffusers on\n{ending}."
    table = {**schedule_rows(schedule, scheduler), **rows, "loss": _loss(config)}
    return card_text(data, Path(config.output_dir).resolve().name, text, table, usage)

"""The model card of what a run ships, in the Hub's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import SchedulerMixin

from ..core import noise_level, snr
from ..scheduler_base import ZeroSNRScheduler
from .config import RunConfig


def terminal_snr(schedule: Any) -> float:
    """SNR at the last timestep of a scheduler."""
    return float(snr(noise_level(schedule.alphas_cumprod, -1)))


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
    facts = schedule.config
    zero = terminal_snr(schedule) == 0
    data.library_name = "diffusers"
    data.tags = [*(data.tags or []), *(["zero-terminal-snr"] if zero else []), str(facts["prediction_type"])]
    table = {
        "prediction type": f"`{facts['prediction_type']}`",
        "schedule": f"`{facts['beta_schedule']}`, beta {facts['beta_start']} to {facts['beta_end']}, "
        f"`rescale_betas_zero_snr={facts['rescale_betas_zero_snr']}`",
        "signal-to-noise ratio at the last timestep": f"{terminal_snr(schedule):.6g}",
        "scheduler, timestep spacing": f"`{type(scheduler).__name__}`, `{scheduler.config.timestep_spacing}`",
        **rows,
        "loss": _loss(config),
    }
    lines = "\n".join(f"| {name} | {text} |" for name, text in table.items())
    return f"""---
{data.to_yaml()}
---

# {Path(config.output_dir).resolve().name}

{subject}, trained for {config.max_train_steps:,} steps with zsnr_diffusers on
{"the schedule of Lin et al. 2023 (arXiv:2305.08891), ending at pure noise" if zero else "its own schedule"}.

| | |
|---|---|
{lines}

{usage}"""

"""Model cards in the Hub's format: what a sampler needs to know of a model."""

from collections.abc import Mapping
from typing import Any

import huggingface_hub

from .core import SCHEDULE_NAMES, noise_level, schedule_table, snr


def terminal_snr(scheduler: Any) -> float:
    """SNR at the last timestep of the schedule that a scheduler's config describes."""
    facts = {name: scheduler.config[name] for name in SCHEDULE_NAMES if name in scheduler.config}
    return float(snr(noise_level(schedule_table(**facts), -1)))


def schedule_tags(schedule: Any) -> list[str]:
    """By which a model of this schedule is found at the Hub."""
    zero = ["zero-terminal-snr"] if terminal_snr(schedule) == 0 else []
    return [*zero, str(schedule.config["prediction_type"])]


def schedule_rows(schedule: Any, scheduler: Any) -> dict[str, str]:
    """Of the card's table, by name.

    Args:
        schedule: scheduler of the schedule that the model was trained on.
        scheduler: the one that is shipped.
    """
    facts = {"rescale_betas_zero_snr": False, **schedule.config}
    spacing = scheduler.config.get("timestep_spacing", "of its own")
    return {
        "prediction type": f"`{facts['prediction_type']}`",
        "schedule": f"`{facts['beta_schedule']}`, beta {facts['beta_start']} to {facts['beta_end']}, "
        f"`rescale_betas_zero_snr={facts['rescale_betas_zero_snr']}`",
        "signal-to-noise ratio at the last timestep": f"{terminal_snr(schedule):.6g}",
        "scheduler, timestep spacing": f"`{type(scheduler).__name__}`, `{spacing}`",
    }


def card_text(
    data: huggingface_hub.ModelCardData, title: str, subject: str, rows: Mapping[str, str], usage: str
) -> str:
    """A model card.

    Args:
        data: metadata.
        title: its heading.
        subject: a paragraph.
        rows: of the table, by name.
        usage: Markdown, from the code on.
    """
    lines = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""---
{data.to_yaml()}
---

# {title}

{subject}

| | |
|---|---|
{lines}

{usage}"""

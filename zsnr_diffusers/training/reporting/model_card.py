"""The model card of a run's result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from diffusers import SchedulerMixin

from ...hub.model_card import card_text, schedule_rows, schedule_tags, terminal_snr
from ...schedulers.flow import FlowMatchScheduler
from ..schedule import Schedule


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained, for its card."""

    folder: Path
    steps: int
    loss: str


def training_model_card(
    record: TrainingRecord,
    schedule: Schedule,
    scheduler: SchedulerMixin,
    data: huggingface_hub.ModelCardData,
    subject: str,
    rows: Mapping[str, str],
    usage: str,
) -> str:
    """Text of a trained model's card: schedule, prediction type, spacing, loss, and how to sample.

    Args:
        record: of the run.
        schedule: the training schedule.
        scheduler: the saved one.
        data: metadata, to which the tags of the schedule are added.
        subject: what was trained.
        rows: more of the table, by name.
        usage: Markdown, from the code on.
    """
    data.library_name = "diffusers"
    data.tags = [*(data.tags or []), *schedule_tags(schedule)]
    text = f"{subject}, trained for {record.steps:,} steps with zsnr_diffusers on\n{_describe_schedule(schedule)}."
    table = {**schedule_rows(schedule, scheduler), **rows, "loss": record.loss}
    return card_text(data, record.folder.resolve().name, text, table, usage)


def _describe_schedule(schedule: Schedule) -> str:
    """The noise schedule that a model was trained on, in words for its card."""
    if isinstance(schedule, FlowMatchScheduler):
        return "flow times (rectified flow, arXiv:2209.03003), which start at pure noise"
    zero = terminal_snr(schedule) == 0
    return "the schedule of Lin et al. 2023 (arXiv:2305.08891), ending at pure noise" if zero else "its own schedule"

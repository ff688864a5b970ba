"""Model cards in the Hub's format: what a sampler needs to know about a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from ..core import SCHEDULE_NAMES, noise_level, schedule_table, snr
from ..guidance.mixin import stock_class
from ..schedulers.config import is_flow
from ..start.start import START_FILE
from .custom_pipeline import bundled_scheduler
from .flow_models import stock_scheduler_for
from .lora_files import KOHYA_FILE, LORA_FILE
from .weight_files import DTYPE_ARGUMENT

SUBJECT = "Saved by zsnr_diffusers."

FLOW_TAGS = ["flow-matching", "rectified-flow", "flow_prediction"]
"""Tag that identifies flow-matching models on the Hub."""

SAMPLERS_OF_BETAS = """\
With another sampler, keep `prediction_type`, `rescale_betas_zero_snr` and `timestep_spacing` of the scheduler config.
"""
SAMPLERS_OF_FLOW = """\
Samplers for betas cannot sample a flow-matching model. Use `FlowMatchMultistepScheduler` of zsnr_diffusers,
`FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)`, diffusers' flow-matching schedulers, or UniPC and
DPM++ with `use_flow_sigmas=True`. In ComfyUI, a Stable Diffusion model of this kind needs the node ModelSamplingSD3,
with the shift in the table.
"""


def terminal_snr(scheduler: Any) -> float:
    """Signal-to-noise ratio at the last timestep of a scheduler's schedule; 0 for flow matching."""
    if is_flow(scheduler.config):
        return 0.0
    facts = {name: scheduler.config[name] for name in SCHEDULE_NAMES if name in scheduler.config}
    return float(snr(noise_level(schedule_table(**facts), -1)))


def schedule_tags(schedule: Any) -> list[str]:
    """Hub tags of a model card for the schedule that the model was trained with."""
    if is_flow(schedule.config):
        return FLOW_TAGS
    zero = ["zero-terminal-snr"] if terminal_snr(schedule) == 0 else []
    return [*zero, str(schedule.config["prediction_type"])]


def schedule_rows(schedule: Any, scheduler: Any) -> dict[str, str]:
    """Rows of a model card's table about schedule and scheduler, by name.

    Args:
        schedule: scheduler with the training schedule.
        scheduler: the one that is saved with the model.
    """
    if is_flow(config := schedule.config):
        dynamic = "depends on the image size" if config.get("use_dynamic_shifting") else None
        return {
            "prediction type": "`flow_prediction`: noise - x_0 at x_s = (1 - s) x_0 + s noise, s from 0 to 1",
            "timestep of the network": "s - 1, starting from noise" if config.get("invert_sigmas") else "1000 s",
            "shift": dynamic or f"`{config.get('flow_shift', config.get('shift', 1.0)):g}`",
            "scheduler": f"`{type(scheduler).__name__}`",
        }
    facts = {"rescale_betas_zero_snr": False, **config}
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
    """Text of a model card: YAML metadata, title, subject, table and usage.

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


def pipeline_card(pipe: Any, path: Path, repo: str) -> str:
    """Text of a pipeline's model card: schedule, prediction type, spacing, guidance, and how to load it."""
    stock = stock_class(type(pipe))
    data = huggingface_hub.ModelCardData(library_name="diffusers", tags=[])
    if stock.__name__ in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        data.pipeline_tag = "text-to-image"
    rows = {"pipeline": f"`{stock.__name__}`"}
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None and (is_flow(scheduler.config) or "beta_schedule" in scheduler.config):
        rows |= schedule_rows(scheduler, stock_scheduler_for(pipe))
        data.tags = schedule_tags(scheduler)
    rows |= guidance_rows(*_default_guidance(pipe))
    if (start := getattr(pipe, "default_start", None)) is not None and path.suffix != ".safetensors":
        k = start.law.frequencies
        rows["start"] = f"the lowest {k} x {k} frequencies that the model expects in x_T, in `{START_FILE}`"
    return card_text(data, repo.split("/")[-1], SUBJECT, rows, _pipeline_usage(pipe, path, repo))


def _pipeline_usage(pipe: Any, path: Path, repo: str) -> str:
    """Usage section of a pipeline's model card, for a single file or a folder."""
    if path.suffix == ".safetensors":
        return f"""```python
from huggingface_hub import hf_hub_download
from zsnr_diffusers import load_pipeline

pipe = load_pipeline(hf_hub_download("{repo}", "{path.name}"))
```

The file's keys and metadata record what the model predicts; diffusers' `from_single_file` does not read them.
"""
    code = f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}")
```

{other_samplers_text(getattr(pipe, "scheduler", None))}"""
    phi, k = _default_guidance(pipe)
    parts = {
        "the guidance rescale": phi > 0,
        "kept low frequencies": k > 0,
        "the start": getattr(pipe, "default_start", None) is not None,
        "its own sampler": bundled_scheduler(pipe) is not None,
    }
    brought = [name for name, there in parts.items() if there]
    if brought:
        listed = " and ".join(filter(None, [", ".join(brought[:-1]), brought[-1]]))
        code += f"""\
`pipeline.py` in this repo adds {listed}:
`DiffusionPipeline.from_pretrained("{repo}", custom_pipeline="{repo}", trust_remote_code=True)`.
"""
    return code


def other_samplers_text(scheduler: Any) -> str:
    """Paragraph of a model card about samplers other than the saved one."""
    return SAMPLERS_OF_FLOW if scheduler is not None and is_flow(scheduler.config) else SAMPLERS_OF_BETAS


def public_base_name(source: str) -> str:
    """A base model's name without a local path: its Hub id, or its folder's name."""
    return Path(source).resolve().name if Path(source).exists() else source


def lora_card(pipe: Any, path: Path, repo: str, dora: bool) -> str:
    """Text of a LoRA's model card: its base and schedule, and how to load both."""
    name = str(pipe.config.get("_name_or_path") or "")
    base = public_base_name(name) if name else "the base"
    scheduler, (phi, k) = stock_scheduler_for(pipe), _default_guidance(pipe)
    data = huggingface_hub.ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=name if name and not Path(name).exists() else None,
        base_model_relation="adapter",
        tags=["lora", *schedule_tags(pipe.scheduler)],
    )
    rows = {"base": f"`{base}`", **schedule_rows(pipe.scheduler, scheduler), **guidance_rows(phi, k)}
    guidance = {"guidance_rescale": phi} if phi else {}
    usage = lora_usage(base, repo, scheduler, guidance, dora, path.name if path.suffix == ".safetensors" else None)
    return card_text(data, repo.split("/")[-1], SUBJECT, rows, usage)


def lora_usage(
    base: str, source: str, scheduler: Any, guidance: Mapping[str, float], dora: bool, file: str | None = None
) -> str:
    """Usage section of a LoRA's model card, with diffusers alone and with this package.

    Args:
        base: Hub id of its base.
        source: folder or repo of the LoRA.
        scheduler: saved with it.
        guidance: recommended arguments of a call.
        dora: whether it is a DoRA.
        file: a file with kohya's names, instead of a folder with scheduler and weights.
    """
    stock, name = type(scheduler).__name__, "" if file is None else f', weight_name="{file}"'
    ours = f"""```python
from zsnr_diffusers import load_lora, load_pipeline

pipe = load_lora(load_pipeline("{base}"), "{source}"{name})
image = pipe({_call_arguments({key: value for key, value in guidance.items() if key != "guidance_rescale"})}).images[0]
```
"""
    needs = "There, too, set prediction type, zero terminal SNR and spacing as in the table."
    if is_flow(scheduler.config):
        needs = f"With this LoRA, the base becomes a flow-matching model.\n{SAMPLERS_OF_FLOW.rstrip()}"
    if file is not None:
        return f"""{ours}
This sets the scheduler and the guidance settings that the file records.
ComfyUI, Forge, InvokeAI and kohya's scripts read its weights. {needs}
"""
    others = (
        "Other programs implement DoRA differently; for them, merge it into the base: `pipe.fuse_lora()`."
        if dora
        else f"ComfyUI, Forge, InvokeAI and kohya's scripts read `{KOHYA_FILE}`, and not `{LORA_FILE}`."
    )
    return f"""```python
import torch
from diffusers import DiffusionPipeline, {stock}

pipe = DiffusionPipeline.from_pretrained("{base}", {DTYPE_ARGUMENT}=torch.float32)
pipe.load_lora_weights("{source}", weight_name="{LORA_FILE}")
pipe.scheduler = {stock}.from_pretrained("{source}", subfolder="scheduler")
image = pipe({_call_arguments(guidance)}).images[0]
```

The weights do not work with another schedule. With zsnr_diffusers, one line loads weights, scheduler and
guidance settings:

{ours}
{others} {needs}
"""


def _call_arguments(guidance: Mapping[str, float]) -> str:
    """Arguments of a pipeline call as Python source, a placeholder prompt first."""
    return ", ".join(['"..."', *(f"{key}={value:g}" for key, value in guidance.items())])


def _default_guidance(pipe: Any) -> tuple[float, int]:
    """A pipeline's `default_guidance_rescale` and `default_keep_low_frequencies`, 0 where it has none."""
    return (
        float(getattr(pipe, "default_guidance_rescale", 0.0)),
        int(getattr(pipe, "default_keep_low_frequencies", 0)),
    )


def guidance_rows(guidance_rescale: float, keep_low_frequencies: int) -> dict[str, str]:
    """Rows of a model card's table about guidance; settings that are 0 are omitted."""
    k = keep_low_frequencies
    rows = {"recommended guidance rescale": f"{guidance_rescale:g}"} if guidance_rescale else {}
    return rows | ({"recommended `keep_low_frequencies` of zsnr_diffusers": f"{k}"} if k else {})

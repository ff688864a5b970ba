"""What a run of pixels ships: `DDPMPipeline`, or `ClassConditionalPipeline` with its code, and the model card."""

from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import DDPMPipeline, DDPMScheduler

from ...class_conditional import ClassConditionalPipeline
from ...hub.custom_pipeline import write_custom_pipeline
from ...schedulers import ZeroSNRDDPMScheduler
from ...schedulers.stock import stock_scheduler
from ..reporting.model_card import model_card
from .classes import Classes
from .config import PixelTrainingConfig


def shipped_scheduler(schedule: ZeroSNRDDPMScheduler) -> DDPMScheduler:
    """Stock's `DDPMScheduler`, the paper's sampler in its thousand steps; see `stock_scheduler` for fewer."""
    spacing = "trailing" if schedule.config["rescale_betas_zero_snr"] else "leading"
    return stock_scheduler(schedule, timestep_spacing=spacing)


def save_pipeline_folder(
    unet: Any, schedule: ZeroSNRDDPMScheduler, classes: Classes | None, config: PixelTrainingConfig
) -> None:
    """Write the trained pipeline into the run's folder."""
    folder, scheduler = Path(config.output_dir), shipped_scheduler(schedule)
    (folder / "README.md").write_text(_card(schedule, scheduler, classes, config), encoding="utf-8")
    if classes is None:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)
        return
    pipe = ClassConditionalPipeline(unet, scheduler)
    write_custom_pipeline(pipe, folder)
    pipe.save_pretrained(folder)


def _card(
    schedule: ZeroSNRDDPMScheduler, scheduler: DDPMScheduler, classes: Classes | None, config: PixelTrainingConfig
) -> str:
    datasets = [config.dataset_name] if config.dataset_name and not Path(config.dataset_name).exists() else None
    data = huggingface_hub.ModelCardData(pipeline_tag="unconditional-image-generation", datasets=datasets)
    rows = {"variance": f"`{config.variance_type}`"}
    if classes is not None:
        named = ", ".join(f"{label} {name}" for label, name in enumerate(classes.names or ()))
        rows["classes"] = named or f"0 to {classes.count - 1}"
    base = config.pretrained_model_name_or_path
    subject = f"A new `{config.unet}`" if base is None else Path(base).name
    usage = (_UNCONDITIONAL if classes is None else _CONDITIONAL).format(name=Path(config.output_dir).name)
    return model_card(config, schedule, scheduler, data, subject, rows, usage)


_UNCONDITIONAL = """\
```python
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{name}")
image = pipe(num_inference_steps=1000).images[0]
```

In fewer steps: `pipe.scheduler = zsnr_diffusers.ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config)`.
"""

_CONDITIONAL = """\
```python
from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRMultistepScheduler

pipe = ClassConditionalPipeline.from_pretrained("{name}")
image = pipe(class_labels=0, num_inference_steps=1000).images[0]
pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config)
image = pipe(class_labels=0, num_inference_steps=20, guidance_scale=1.5).images[0]
```

Without zsnr_diffusers: `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)`.
"""

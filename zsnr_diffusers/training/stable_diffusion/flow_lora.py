"""A LoRA that makes its base a rectified flow, as files that say so."""

from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from ...guidance.mixin import guidance_record
from ...hub.ldm_format import layout_of_pipeline
from ...hub.lora_export import adapter_weights, adapters_of, is_dora, write_kohya_file, write_stock_file
from ...hub.lora_files import KOHYA_FILE, LORA_FILE
from ...hub.single_file import file_metadata
from ...hub.weight_files import DTYPE_ARGUMENT
from ..config import FlowConfig
from ..config.objective import FLOW
from .config import GuidedOutputConfig

FLOW_SAMPLERS = """\
Samplers for betas do not fit a rectified flow. `FlowMatchMultistepScheduler` of zsnr_diffusers does,
`FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)`, and so do stock's UniPC and DPM++ with
`use_flow_sigmas=True`. In ComfyUI the model goes through the node ModelSamplingSD3, with the shift of the table.
"""


def save_flow_lora(pipe: Any, scheduler: SchedulerMixin, config: FlowConfig, folder: Path) -> None:
    """Write the adapter of a pipeline, in the files that `save_lora` writes.

    Args:
        pipe: with one adapter, in its UNet, and the guidance rescale to record.
        scheduler: of stock, shipped with it.
        config: by which flow times were drawn.
        folder: made if need be.
    """
    adapters = adapters_of(pipe)
    weights = {part: adapter_weights(pipe, part, adapter) for part, adapter in adapters.items()}
    metadata = _metadata(pipe, config, folder.resolve().name)
    scheduler.save_pretrained(folder / "scheduler")
    if not is_dora(pipe, adapters):
        write_kohya_file(folder / KOHYA_FILE, pipe, weights, metadata)
    # Last: a folder without it is not taken for a result.
    write_stock_file(folder / LORA_FILE, pipe, adapters, weights, metadata)


def _metadata(pipe: Any, config: FlowConfig, title: str) -> dict[str, str]:
    """What the model predicts, by the names of stock's scheduler configs for us and by those of sd-scripts."""
    record = {
        "prediction_type": FLOW,
        "use_flow_sigmas": True,
        "flow_shift": config.flow_shift,
        "num_train_timesteps": 1000,
    }
    if pipe.default_guidance_rescale > 0:
        record |= guidance_record(pipe.default_guidance_rescale, pipe.guidance_space)
    layout = layout_of_pipeline(pipe)
    architecture = f"{layout.architectures['epsilon']}/lora"
    schemes = {"logit_normal": "logit_normal", "uniform": "none"}
    said = {
        "ss_base_model_version": layout.bases["epsilon"],
        "ss_discrete_flow_shift": config.flow_shift,
        "ss_weighting_scheme": schemes.get(config.flow_time_sampling, config.flow_time_sampling),
        "ss_logit_mean": config.logit_mean,
        "ss_logit_std": config.logit_std,
    }
    return file_metadata(pipe, record, architecture, title) | {key: str(value) for key, value in said.items()}


def flow_lora_usage(base: str, source: str, scheduler: SchedulerMixin, config: GuidedOutputConfig, dora: bool) -> str:
    """How to load such a LoRA.

    Args:
        base: Hub id of its base.
        source: of the folder or repo that it is in.
        scheduler: shipped with it.
        config: with the guidance to recommend.
        dora: whether it is one, which has no file for other programs.
    """
    stock = type(scheduler).__name__
    others = "" if dora else f"\nOther programs read `{KOHYA_FILE}`, and have to be told that it is a flow model."
    return f"""```python
import torch
from diffusers import DiffusionPipeline, {stock}

pipe = DiffusionPipeline.from_pretrained("{base}", {DTYPE_ARGUMENT}=torch.float32)
pipe.load_lora_weights("{source}", weight_name="{LORA_FILE}")
pipe.scheduler = {stock}.from_pretrained("{source}", subfolder="scheduler")
image = pipe("...", guidance_scale={config.guidance_scale:g}, guidance_rescale={config.guidance_rescale:g}).images[0]
```

With these weights the base is a rectified flow.
{FLOW_SAMPLERS.rstrip()}{others}
"""

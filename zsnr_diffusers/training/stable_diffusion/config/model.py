"""The model of a run: the base pipeline, and the adapter that is trained instead of its UNet."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ...config import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option

LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
]
"""Attention and its projections; residual blocks with their timestep projection; the first and the last layer."""


@dataclass
class BaseConfig(Options):
    """The base pipeline of a run."""

    pretrained_model_name_or_path: Annotated[str, IDENTITY] = option(
        "",
        "Stable Diffusion 1.x, 2.x or SDXL model to start from, epsilon, v-prediction, or a flow model from "
        "--prediction_type flow_prediction: a Hub id, a folder, or a .safetensors file.",
    )
    base_config: str | None = option(
        None,
        "For a base in a .safetensors file, which contains only weights: folder or Hub id of a pipeline with its "
        "architecture, for configs and tokenizers. Default: from the Hub.",
    )
    variant: str | None = option(
        None,
        "Variant of the base's weights: fp16 for files like model.fp16.safetensors. Default: none, or the only one "
        "available. Weights are always trained in float32.",
    )

    max_token_length: Annotated[Literal[75, 150, 225], IDENTITY] = option(
        75,
        "Maximum number of tokens per caption. More than 75 are encoded in chunks of 75, and their embeddings "
        "concatenated, as in ComfyUI and A1111's web UI; in diffusers, pass them as prompt_embeds. Previews use the "
        "first 75.",
    )
    clip_skip: Annotated[int | None, NOT_NEGATIVE, IDENTITY] = option(
        None,
        "Number of skipped text encoder layers, counted as clip_skip in diffusers' pipelines: 1 corresponds to 2 in "
        "other programs such as kohya's scripts. Use the same value for sampling.",
    )

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: a Hub id, a folder of a pipeline, or a .safetensors file."
            )
        super().__post_init__()


@dataclass
class AdapterConfig(Options):
    """The LoRA or DoRA to train instead of the complete UNet, if any."""

    lora_rank: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Train a LoRA of this rank with peft instead of the complete UNet: a small file, and optimizer memory only "
        "for its weights. Typical ranks are 16 to 128; changing the prediction type needs a higher rank than adding "
        "a style. Use about ten times the learning rate, 1e-4. Default: the complete UNet.",
    )
    lora_weights: Annotated[str | None, IDENTITY] = option(
        None,
        "A UNet LoRA to continue training: a .safetensors file, a folder or a Hub id. It determines rank, strength "
        "and layers.",
    )
    lora_alpha: Annotated[float | None, POSITIVE, IDENTITY] = option(
        None,
        "Alpha of the LoRA, which is scaled by alpha / rank. Default: the rank, so the scale is 1.",
    )
    use_dora: Annotated[bool, IDENTITY] = option(
        False,
        "Train a DoRA (arXiv:2402.09353), which decomposes weights into magnitude and direction: closer to full "
        "training at low ranks, according to its paper; slower, and supported by fewer programs.",
    )
    lora_target_modules: Annotated[list[str], IDENTITY] = option(  # noqa: RUF009
        LORA_TARGETS,
        "Layers that get a LoRA, by name suffix. Only attention (to_q to_k to_v to_out.0) is common for styles, but "
        "hardly converts epsilon to v-prediction: this changes the combination of input and output at each timestep, "
        "which needs the convolutions, especially the first and the last.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_target_modules:
            raise ValueError("--lora_target_modules=[] contains no layer; omit it to use the default.")
        defaults = {"lora_alpha": None, "use_dora": False, "lora_target_modules": LORA_TARGETS}
        idle = [f"--{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.lora_weights and (idle or self.lora_rank):
            given = [*([f"--lora_rank={self.lora_rank}"] if self.lora_rank else []), *idle]
            raise ValueError(f"{', '.join(given)}: --lora_weights already determines this; omit one of them.")
        if self.lora_rank is None and idle:
            raise ValueError(
                f"{', '.join(idle)}: without --lora_rank the complete UNet is trained; pass a rank, or omit this."
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA or DoRA is trained, and not the whole UNet."""
        return bool(self.lora_rank or self.lora_weights)

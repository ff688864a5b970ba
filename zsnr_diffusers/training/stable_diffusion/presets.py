"""Sets of options by the memory of the machine, for what most people train on it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from ..config import Options, option


class Preset(NamedTuple):
    """Options that fit a machine."""

    gigabytes: float
    """Memory of its GPU, 1e9 bytes."""
    options: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = {
    "80gb": Preset(
        80,
        {
            "mixed_precision": "bf16",
            "train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "dataloader_num_workers": 8,
        },
    ),
    "24gb": Preset(
        24,
        {
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "use_8bit_adam": True,
            "ema_device": "cpu",
            "ema_update_interval": 50,
            "train_batch_size": 16,
            "gradient_accumulation_steps": 8,
            "dataloader_num_workers": 4,
        },
    ),
    "laptop": Preset(
        8,
        {
            "mixed_precision": "auto",
            "gradient_checkpointing": True,
            "lora_rank": 32,
            "learning_rate": 1e-4,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 16,
            "dataloader_num_workers": 2,
            "luminance_images": 8,
        },
    ),
}
"""For Stable Diffusion 1.x and 2.x at 512 pixels; global batches on one GPU are 128, of the LoRA 32. SDXL and larger
images take smaller batches: a run that would not fit is refused before its first step, with the batch that does."""

Configured = TypeVar("Configured", bound="type[PresetConfig]")


def _written(options: Mapping[str, Any]) -> str:
    """Options as they stand in a file."""
    values = {True: "yes", False: "no"}
    return ", ".join(f"{name} {values[it] if isinstance(it, bool) else it}" for name, it in options.items())


@dataclass
class PresetConfig(Options):
    """The preset whose options stand where no others are passed."""

    preset: Literal["80gb", "24gb", "laptop"] | None = option(
        None,
        "Options for one GPU of 80 or of 24 GB, to train the whole UNet of Stable Diffusion 1.x or 2.x at 512 pixels, "
        "or for a laptop, with 8 GB or without a GPU, to train a LoRA. Those of --config and of the command line win "
        "over it. A step that takes more memory is refused before the start. "
        f"{'. '.join(f'{name}: {_written(one.options)}' for name, one in PRESETS.items())}.",
    )

    @property
    def gpu_gigabytes(self) -> float | None:
        """Memory of the GPU that the preset is for, 1e9 bytes; None without a preset."""
        return None if self.preset is None else PRESETS[self.preset].gigabytes

    def describe_preset(self) -> dict[str, str]:
        """A line of the plan: what the preset set, and what it would have set but for other options."""
        if self.preset is None:
            return {}
        options = PRESETS[self.preset].options
        kept = {name: value for name, value in options.items() if getattr(self, name) == value}
        others = {name: getattr(self, name) for name in options if name not in kept}
        but = f"; passed instead: {_written(others)}" if others else ""
        return {"preset": f"{self.preset}: {_written(kept)}{but}"}


def with_presets(kind: Configured) -> Configured:
    """Let a configuration take the options of its preset where they are not passed.

    A decorator above `dataclass`. Command line, YAML and Python then have one meaning of a preset, and a configuration
    that was written down, with all options in it, stays as it is whatever a later version's presets are.
    """
    initialize = kind.__init__

    @functools.wraps(initialize)
    def initialize_with_preset(self: Any, *args: Any, **options: Any) -> None:
        preset = PRESETS.get(str(options.get("preset")))
        initialize(self, *args, **{**(preset.options if preset else {}), **options})

    kind.__init__ = initialize_with_preset  # type: ignore[method-assign]
    return kind

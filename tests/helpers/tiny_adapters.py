"""LoRA and DoRA in the small Stable Diffusions of `tiny_checkpoints`."""

from importlib.metadata import version

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key
from packaging.version import Version
from peft import LoraConfig
from tiny_checkpoints import generate, sd_scheduler, tiny_pipeline

from zsnr_diffusers import ZeroSNRDDIMScheduler, enable_guidance_rescale
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS

try:
    from transformers.integrations.peft import MIN_PEFT_VERSION
except ImportError:
    MIN_PEFT_VERSION = "0"

TEXT_ADAPTERS = Version(version("peft")) >= Version(MIN_PEFT_VERSION)
"""Whether text encoders can have an adapter: transformers 5.24 asks for a version of peft that is not released yet."""

needs_text_adapters = pytest.mark.skipif(
    not TEXT_ADAPTERS, reason=f"transformers asks for peft {MIN_PEFT_VERSION}, and {version('peft')} is installed"
)

PHI = 0.6

TARGETS = [target for target in LORA_TARGETS if target not in ("conv_in", "conv_out")]
"""Those that diffusers 0.35 finds in kohya's files too."""

FINDS_ALL_TARGETS = _convert_unet_lora_key("lora_unet_conv_in") == "conv_in"
"""Whether the installed diffusers finds the others there."""

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""As kohya's scripts have them; diffusers misreads files of theirs without out_proj."""


def add_adapter(part, name="default", rank=3, **changes):
    """An adapter that does something: peft's own does nothing before it is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part.add_adapter(LoraConfig(r=rank, **{"lora_alpha": 5, "target_modules": TARGETS, **changes}), name)
        with torch.no_grad():
            for key, value in part.named_parameters():
                if "lora_B" in key or "magnitude" in key:
                    value += 0.05 * torch.randn(value.shape)


def adapted(kind="1", texts=False, **changes):
    """A pipeline with an adapter for zero SNR, on the paper's sampler; `texts`, in text encoders too if they can."""
    pipe = tiny_pipeline(kind, ZeroSNRDDIMScheduler.from_config(sd_scheduler().config, prediction_type="v_prediction"))
    add_adapter(pipe.unet, **changes)
    for name in ("text_encoder", "text_encoder_2"):
        if texts and TEXT_ADAPTERS and hasattr(pipe, name):
            add_adapter(getattr(pipe, name), lora_alpha=2, target_modules=TEXT_TARGETS)
    return enable_guidance_rescale(pipe, PHI)


def assert_paints_alike(pipe, other):
    # The strength stands in the weights rather than behind the product: float32 rounds elsewhere.
    torch.testing.assert_close(generate(pipe), generate(other), rtol=0, atol=1e-4)

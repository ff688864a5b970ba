"""Models as the Hub has them, written once per test process; what is to hold of models trained from them."""

import copy
import functools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from small_pipelines.published import load_published, write_published, write_published_file

from zsnr_diffusers.hub.lora_files import LORA_FILE
from zsnr_diffusers.hub.weight_files import DTYPE_ARGUMENT

RESOLUTION = 64
"""The least that four levels of a UNet and three of an autoencoder can halve."""

FORMS = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "variant": "fp16"},
}
"""How a repo stores its weights; the last is a variant beside nothing else."""


@functools.cache
def _room():
    return tempfile.TemporaryDirectory(prefix="published-")


@functools.cache
def published(name, form="float32"):
    """The folder of a model; do not change it."""
    return write_published(name, Path(_room().name, f"{name}-{form}"), sample_size=RESOLUTION // 8, **FORMS[form])


@functools.cache
def shallow():
    """The folder of Stable Diffusion 1.5 with a `shallow_unet`; do not change it.

    For tests of the training loop itself: they train hundreds of times, and no network is what they look at.
    """
    folder = Path(shutil.copytree(published("1.5"), Path(_room().name, "shallow")))
    shallow_unet(UNet2DConditionModel.load_config(folder / "unet")).save_pretrained(folder / "unet")
    return folder


def shallow_unet(config):
    """Of a UNet's levels the first and the last, with a layer each; weights from seed 0."""
    levels = len(config["block_out_channels"])
    per_level = {
        key: value for key, value in config.items() if isinstance(value, list | tuple) and len(value) == levels
    }
    changes = {key: [value[0], value[-1]] for key, value in per_level.items()} | {"layers_per_block": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config({**config, **changes}).eval()


def published_pipeline(name):
    """The model in float32, as diffusers loads it, but for its safety checker, for the caller to change."""
    return independent(_loaded(name))


@functools.cache
def _loaded(name):
    return load_published(name, published(name))


IN_MEMORY = """
for part in pipe.components.values():
    for weights in part.parameters() if isinstance(part, torch.nn.Module) else ():
        weights.data = weights.data.clone()
"""
"""Takes the weights of a pipeline that was loaded out of the mapped file: kernels round by how memory is aligned."""


def in_memory(pipe):
    """The pipeline, after `IN_MEMORY`, which processes without this package run too."""
    exec(IN_MEMORY, {"pipe": pipe, "torch": torch})
    return pipe


def networks(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def independent(pipe):
    """A pipeline like another, with copies of all but its tokenizers."""
    own = copy.copy(pipe)
    for name, part in {**networks(pipe), "scheduler": pipe.scheduler}.items():
        setattr(own, name, copy.deepcopy(part))
    return own


@functools.cache
def published_file(name, form="float32"):
    """The same model as one file; do not change it."""
    path = Path(_room().name, f"{name}-{form}.safetensors")
    return write_published_file(name, path, published(name), FORMS[form].get("dtype", torch.float32))


def dtypes_in(folder):
    """Of all floating-point weights in what a run ships."""
    found = set()
    for file in [
        *Path(folder).glob("*.safetensors"),
        *Path(folder).glob("[!c]*/*.safetensors"),
    ]:  # no cache, checkpoint
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    return found - {"I64"}


def images_of(pipe):
    """Two small images by a pipeline's own sampler, as an array."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION, "output_type": "np"}
    return pipe(["a dark landscape", "snow"], generator=torch.Generator().manual_seed(0), **call).images


def opened_by_diffusers(folder):
    """A trained pipeline as diffusers opens it by itself, without any argument."""
    return DiffusionPipeline.from_pretrained(folder)


def lora_opened_by_diffusers(folder, base):
    """A trained LoRA in its base, as a user of diffusers applies it."""
    pipe = DiffusionPipeline.from_pretrained(base, **{DTYPE_ARGUMENT: torch.float32})
    # diffusers 0.35 finds the file itself only where it may ask the Hub
    pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipe


def assert_generates(pipe, dtype=torch.float32):
    """Finite images, by networks of one dtype."""
    dtypes = {name: part.dtype for name, part in networks(pipe).items()}
    assert dtypes == dict.fromkeys(dtypes, dtype)
    images = images_of(pipe)
    assert images.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0
    assert math.isfinite(pipe.scheduler.alphas_cumprod[-1])
    return images

"""Rehearsals at the size of the real models, with random weights: what only size breaks. 24 GB of memory are enough.

Each command is a process of its own, whose peak of memory is printed (`pytest -m slow -s`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from landscapes import make_landscapes
from safetensors import safe_open

from zsnr_diffusers.hub.weight_files import DTYPE_ARGUMENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

EXAMPLES = Path(__file__).parents[3] / "examples"

WRITE = """
import sys, torch
from pathlib import Path
from small_pipelines.published import write_published
write_published(sys.argv[1], Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]), full_size=True)
"""

WITHOUT_US = f"""
import sys
sys.modules["zsnr_diffusers"] = None
DTYPE = {DTYPE_ARGUMENT!r}
import numpy as np, torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
folder, lora = sys.argv[1], sys.argv[2:]
pipe = DiffusionPipeline.from_pretrained(folder, **{{DTYPE: torch.float32}} if lora else {{}})  # SDXL's own needs it
if lora:
    pipe.load_lora_weights(lora[0], weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(lora[0], subfolder="scheduler")
assert {{part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)}} == {{torch.float32}}
images = pipe("a dark landscape", num_inference_steps=1, height=64, width=64, output_type="np").images
assert np.isfinite(images).all() and images.std() > 0
"""


@pytest.fixture
def run(tmp_path):
    """Run Python with these arguments; its peak of memory in GB, printed too."""

    def python(what, *arguments):
        path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
        process = subprocess.Popen([sys.executable, *map(str, arguments)], env={**os.environ, "PYTHONPATH": path})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, what
        peak = usage.ru_maxrss / 1e6
        print(f"\n{what}: peak of memory {peak:.1f} GB, {usage.ru_utime + usage.ru_stime:.0f} s of CPU")
        return peak

    return python


@pytest.fixture
def photos(tmp_path):
    return make_landscapes(tmp_path / "photos", count=2, image_size=64)


def training(base, photos, folder, *more):
    options = {
        **{"pretrained_model_name_or_path": base, "train_data_dir": photos, "output_dir": folder},
        **{"resolution": 64, "max_train_steps": 2, "train_batch_size": 1, "checkpointing_steps": 2},
        **{"num_inference_steps": 1, "luminance_images": 1, "checkpoints_total_limit": 1},
    }
    return ["-m", "zsnr_diffusers.training", *(f"--{name}={value}" for name, value in options.items()), *more]


def same_weights(file, other):
    """Of two files of a UNet, without holding either in memory."""
    with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
        keys = set(a.keys())
        return keys == set(b.keys()) and all(a.get_tensor(key).equal(b.get_tensor(key)) for key in keys)


def test_stable_diffusion_15_as_a_whole(run, photos, tmp_path):
    base, trained, file, back = (tmp_path / name for name in ("base", "run", "model.safetensors", "back"))
    run("writing the base", "-c", WRITE, "1.5", base, "float32")
    run("training", *training(base, photos, trained))
    run("opening it by diffusers alone", "-c", WITHOUT_US, trained)
    run("converting it to a file", "-m", "zsnr_diffusers.cli", "convert", trained, file)
    run("reading it back", "-m", "zsnr_diffusers.cli", "convert", file, back, "--config", base)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert same_weights(trained / weights, back / weights)
    assert not same_weights(trained / weights, base / weights)


def test_sdxl_as_a_lora(run, photos, tmp_path):
    base, trained, file, back = (tmp_path / name for name in ("base", "run", "lora.safetensors", "back"))
    run("writing the base", "-c", WRITE, "xl", base, "float16")
    run("training", *training(base, photos, trained, "--lora_rank=4"))
    run("opening it by diffusers alone", "-c", WITHOUT_US, base, trained)
    run("converting it to kohya's names", "-m", "zsnr_diffusers.cli", "convert", trained, file, "--config", base)
    run("reading it back", "-m", "zsnr_diffusers.cli", "convert", file, back, "--config", base)
    assert same_weights(trained / "pytorch_lora_weights.safetensors", back / "pytorch_lora_weights.safetensors")

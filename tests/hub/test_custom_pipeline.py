"""The file with which people who do not have this package load a repo with its rescale."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from guided_pipelines import generate
from hub_server import serve
from published_models import IN_MEMORY, in_memory
from tiny_checkpoints import settings
from tiny_class_conditional import build, generate_classes
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import disable_guidance_rescale, enable_guidance_rescale, save_pipeline, write_custom_pipeline
from zsnr_diffusers.hub.custom_pipeline import bundled_scheduler
from zsnr_diffusers.schedulers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)

# A process in which the package does not exist; what it generates goes to a file.
WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
repo, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
IN_MEMORY
images = []
for more in CALLS:
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    call = {"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent", "generator": generator}
    images.append(pipe("a dark landscape", num_images_per_prompt=2, **call, **more).images)
torch.save([type(pipe).__name__, *images], target)
"""


def in_a_process_without_us(repo, tmp_path, calls="[{}]", **environment):
    code = WITHOUT_US.replace("CALLS", calls).replace("IN_MEMORY", IN_MEMORY)
    result = subprocess.run(
        [sys.executable, "-c", code, repo, tmp_path / "generated.pt"],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "generated.pt")


@pytest.mark.full
@pytest.mark.parametrize("space", ["output", "v"])
def test_a_folder_opens_with_its_rescale_where_this_package_is_not(space, tmp_path):
    folder = tmp_path / "repo"
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.4, space=space)
    pipe.save_pretrained(folder)
    write_custom_pipeline(pipe, folder)
    calls = '[{}, {"guidance_rescale": 0.0}, {"guidance_rescale": 1.0}]'
    name, default, off, full = in_a_process_without_us(folder, tmp_path, calls)
    assert name == "RescaledStableDiffusionPipeline"
    assert torch.equal(default, generate(pipe))
    assert torch.equal(off, generate(tiny_stable_diffusion()))
    assert torch.equal(full, generate(pipe, guidance_rescale=1.0))


MULTISTEP = ZeroSNRMultistepScheduler(prediction_type="v_prediction", solver_order=2)
SAMPLERS = [
    MULTISTEP,
    ZeroSNRMultistepScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=False, timestep_spacing="trailing", eta=0.5
    ),
    ZeroSNRPNDMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    ZeroSNRDDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large"),
    ZeroSNRLCMScheduler(prediction_type="v_prediction", original_inference_steps=40),
]


@pytest.mark.full
def test_a_folder_brings_its_sampler_where_this_package_is_not(tmp_path):
    """And samples by stock's, without it, where nobody trusts its code."""
    pipe = enable_guidance_rescale(tiny_stable_diffusion(MULTISTEP), 0.4)
    folder = save_pipeline(pipe, tmp_path / "repo")
    assert type(DiffusionPipeline.from_pretrained(folder).scheduler).__name__ == "EulerDiscreteScheduler"
    name, generated = in_a_process_without_us(folder, tmp_path)
    assert name == "RescaledStableDiffusionPipeline"
    assert torch.equal(generated, generate(pipe))


@pytest.mark.full
@pytest.mark.parametrize("scheduler", SAMPLERS, ids=lambda scheduler: type(scheduler).__name__)
def test_every_sampler_is_the_same_in_a_file(scheduler, tmp_path):
    pipe = tiny_stable_diffusion(scheduler)
    folder = save_pipeline(pipe, tmp_path / "repo")
    names = {}
    exec(compile((folder / "pipeline.py").read_text(), "pipeline.py", "exec"), names)
    stock = in_memory(DiffusionPipeline.from_pretrained(folder))
    other = names["RescaledStableDiffusionPipeline"](**stock.components, requires_safety_checker=False)
    theirs = other.scheduler
    assert type(theirs).__module__ != type(scheduler).__module__
    assert settings(theirs) == settings(scheduler)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), generate(pipe))


def test_our_ddim_needs_no_code(tmp_path):
    """Stock's Euler stands in for it."""
    pipe = tiny_stable_diffusion(ZeroSNRDDIMScheduler(prediction_type="v_prediction"))
    assert bundled_scheduler(pipe) is None
    assert not (save_pipeline(pipe, tmp_path / "repo") / "pipeline.py").exists()
    unguided = tiny_unconditional()
    unguided.scheduler = MULTISTEP
    assert not (save_pipeline(unguided, tmp_path / "pixels") / "pipeline.py").exists()


@pytest.mark.full
def test_from_the_hub(tmp_path):
    folder = tmp_path / "repo"
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.4)
    pipe.save_pretrained(folder)
    write_custom_pipeline(pipe, folder)
    with serve({"acme/dark": folder}) as endpoint:
        _, default = in_a_process_without_us("acme/dark", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert torch.equal(default, generate(pipe))


@pytest.mark.full
def test_recorded_phi_is_read_from_the_hub(tmp_path):
    enable_guidance_rescale(tiny_stable_diffusion(), 0.4).save_pretrained(tmp_path / "repo")
    code = "import sys, zsnr_diffusers; print(zsnr_diffusers.load_pipeline('acme/dark').default_guidance_rescale)"
    with serve({"acme/dark": tmp_path / "repo"}) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        result = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
        )
    assert result.stdout.strip() == "0.4", result.stderr


def test_a_class_conditional_pipeline(tmp_path):
    """Which stock does not know at all; the scheduler is one of stock's, as ours needs this package."""
    pipe = build(type(build().scheduler)(prediction_type="v_prediction"))
    enable_guidance_rescale(pipe, 0.6)
    expected = generate_classes(pipe)
    source = write_custom_pipeline(pipe, tmp_path).read_text()
    names = {}
    exec(compile(source, "pipeline.py", "exec"), names)
    cls = names["ClassConditionalPipeline"]
    assert cls.__module__ != type(pipe).__module__
    other = cls(pipe.unet, ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate_classes(other), expected)


def test_the_file_imports_nothing_but_torch_and_diffusers(tmp_path):
    source = write_custom_pipeline(tiny_stable_diffusion(), tmp_path).read_text()
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert modules - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    # a file that defines a name twice would keep the later of the two
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names))


def test_a_pipeline_that_does_not_rescale_gets_a_file_that_does_not(tmp_path):
    pipe = disable_guidance_rescale(enable_guidance_rescale(tiny_stable_diffusion()))
    assert "default_guidance_rescale = 0.0" in write_custom_pipeline(pipe, tmp_path).read_text()


def test_a_pipeline_without_guidance_is_refused(tmp_path):
    with pytest.raises(TypeError, match="DDIMPipeline has no classifier-free guidance"):
        write_custom_pipeline(tiny_unconditional(), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_class_that_others_do_not_have_is_refused(tmp_path):
    class Mine(StableDiffusionPipeline):
        pass

    pipe = enable_guidance_rescale(Mine(**tiny_stable_diffusion().components, requires_safety_checker=False))
    with pytest.raises(TypeError, match="Mine is no class of diffusers"):
        write_custom_pipeline(pipe, tmp_path)

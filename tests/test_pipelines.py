"""Our schedulers inside real stock pipelines."""

import json
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from published_models import in_memory
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import IMAGE, tiny_stable_diffusion

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler

OURS = [ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler]
V = {"prediction_type": "v_prediction"}


def generate(pipe, n=5, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a dark landscape",
        num_inference_steps=n,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    ).images


@pytest.mark.parametrize("cls", OURS)
def test_swapped_in_by_one_line_without_a_warning(cls):
    pipe = tiny_stable_diffusion(flawed_scheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **V)
        pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    assert "steps_offset" not in pipe.scheduler.config  # what stock pipelines rewrite
    assert bool(generate(pipe).isfinite().all())


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_equals_stock_ddim_and_euler_on_a_real_network(n):
    """At n that divide T, with stock's own zero-SNR flags. Euler stands in for SNR 0 with 2^-24."""
    pipe = tiny_stable_diffusion(ZeroSNRDDIMScheduler(**V))
    ours = generate(pipe, n)
    flags = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 1, **V}
    for stock in (DDIMScheduler(clip_sample=False, **flags), EulerDiscreteScheduler(**flags)):
        pipe.scheduler = stock
        # 2^-12 of signal at the start that ought to be none
        torch.testing.assert_close(ours, generate(pipe, n), rtol=1e-3, atol=2e-3)


@pytest.mark.full
@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 13])
def test_half_precision_and_odd_numbers_of_steps(cls, dtype, n):
    pipe = tiny_stable_diffusion(cls(**V)).to(dtype)
    latents = generate(pipe, n, guidance_scale=3.0)
    assert latents.dtype == dtype
    assert bool(latents.isfinite().all())


@pytest.mark.full
@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.33, 0.5, 0.77, 0.99, 1.0])
def test_image_to_image_starts_at_the_timestep_that_it_noised_to(cls, strength):
    n = 50
    pipe = StableDiffusionImg2ImgPipeline(**tiny_stable_diffusion(cls(**V)).components, requires_safety_checker=False)
    seen, noised = [], []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0].clone(), int(args[1]))))
    add_noise = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda x, noise, t: noised.append((x, noise, int(t))) or add_noise(x, noise, t)
    generate(pipe, n, image=IMAGE, strength=strength, guidance_scale=1.0)

    steps = min(int(n * strength), n)
    assert [t for _, t in seen] == pipe.scheduler.timesteps[-steps:].tolist()
    (x_0, noise, t), (x_t, first) = noised[0], seen[0]
    assert t == first
    assert pipe.scheduler.begin_index == n - steps
    alpha_bar = pipe.scheduler.alphas_cumprod[t]
    torch.testing.assert_close(x_t, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, rtol=1e-4, atol=1e-4)
    if strength == 1.0:
        assert first == 999
        assert torch.equal(x_t, noise)


def test_own_timesteps_through_a_pipeline():
    pipe = tiny_stable_diffusion(ZeroSNRDDIMScheduler(**V))
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    generate(pipe, timesteps=[999, 700, 20])
    assert seen == [999, 700, 20]


@pytest.mark.full
@pytest.mark.parametrize("cls", OURS)
def test_saved_in_a_pipeline_by_module_path_and_loaded_again(cls, tmp_path):
    """`model_index.json` names the module: it is a file format."""
    pipe = tiny_stable_diffusion(cls(**V))
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["zsnr_diffusers.schedulers", cls.__name__]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is cls
    assert torch.equal(generate(in_memory(loaded)), expected)


@pytest.mark.parametrize("cls", OURS)
def test_module_path_is_one_that_diffusers_can_load(cls):
    """diffusers takes a module inside a folder named like one of its pipelines for that pipeline, and looks for the
    base class of what it loads in the module itself.
    """
    module = cls(**V).__module__
    folders = module.split(".")[:-1]
    assert not any(hasattr(diffusers.pipelines, folder) for folder in folders)
    assert sys.modules[module].SchedulerMixin is diffusers.SchedulerMixin


@pytest.mark.full
def test_one_import_is_enough_to_load_it_in_a_fresh_process(tmp_path):
    pipe = tiny_stable_diffusion(ZeroSNRDDIMScheduler(**V))
    pipe.save_pretrained(tmp_path)
    code = (
        "import zsnr_diffusers, sys; from diffusers import DiffusionPipeline;"
        "print(type(DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert result.stdout.strip() == "ZeroSNRDDIMScheduler", result.stderr

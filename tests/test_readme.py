"""What the README says can be run is run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

import zsnr_diffusers
from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.training import PixelTrainingConfig, parse_config

ROOT = Path(zsnr_diffusers.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_opens_with_two_commands_of_one_line():
    main_job, tests = blocks("sh")[0].splitlines()
    assert README.index("```sh") < 200
    assert main_job.endswith("&& python examples/quickstart.py")
    assert tests.endswith("&& python -m pytest")


def test_the_python_blocks_run(tmp_path):
    pipe = tiny_stable_diffusion(flawed_scheduler())
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    names = []
    for code in blocks("python"):
        names.append({})
        exec(code.replace("path/or/hub-id", str(tmp_path)).replace('"cuda"', '"cpu"'), names[-1])
    sampling, guidance = names
    assert sampling["pipe"].scheduler.alphas_cumprod[-1] == 0
    assert np.asarray(sampling["image"]).shape == (16, 16, 3)
    assert type(guidance["pipe"].default_guider).__name__ == "AdaptiveProjectedGuidance"
    assert guidance["image_to_image"].default_guidance_rescale == 0.7


def commands(module):
    """Arguments of the README's commands that run a module of ours, line by line."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines]
    return [line[line.index(module) + 1 :] for line in words if module in line]


def test_the_training_commands_parse():
    (stable_diffusion,) = commands("zsnr_diffusers.training")
    config = parse_config(stable_diffusion)
    assert config.rescale_betas_zero_snr
    assert len(config.validation_prompts) == 2
    configs = [parse_config(line, PixelTrainingConfig) for line in commands("zsnr_diffusers.training.pixels")]
    assert [(config.unet, config.rescale_betas_zero_snr) for config in configs] == [
        ("ddpm-cifar10", True),
        ("ddpm-cifar10", False),
    ]


def test_the_commands_parse(capsys):
    lines = commands("zsnr") + commands("zsnr_diffusers.cli")
    assert {arguments[0] for arguments in lines} == {"evaluate", "audit", "convert"}
    assert len(lines) == 8
    for arguments in lines:
        # everything is accepted up to the folder or file, which is not here
        assert zsnr(arguments) == 2
        needed = next((option for option in ("--real", "--reference") if option in arguments), arguments[0])
        assert arguments[arguments.index(needed) + 1] in capsys.readouterr().err


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()

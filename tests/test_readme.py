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
from zsnr_diffusers.training import parse_config

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


def test_the_training_command_parses():
    command = next(block for block in blocks("sh") if "accelerate launch" in block).replace("\\\n", " ")
    arguments = shlex.split(command)
    config = parse_config(arguments[arguments.index("zsnr_diffusers.training") + 1 :])
    assert config.rescale_betas_zero_snr
    assert len(config.validation_prompts) == 2


def test_the_evaluation_commands_parse(capsys):
    commands = [block.replace("\\\n", " ").splitlines() for block in blocks("sh") if block.startswith("zsnr ")]
    lines = [line for block in commands for line in block]
    assert len(lines) == 3
    for line in lines:
        # everything is accepted up to the folder, which is not here
        arguments = shlex.split(line)[1:]
        assert zsnr(arguments) == 2
        assert arguments[arguments.index("--real") + 1] in capsys.readouterr().err


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()

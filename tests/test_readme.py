"""What the README says can be run is run."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import in_place_of_the_hub
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

import zsnr_diffusers
from zsnr_diffusers.auditing import api
from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.training import PixelTrainingConfig, measure, parse_config, train

ROOT = Path(zsnr_diffusers.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_opens_with_two_commands_of_one_line():
    main_job, tests = blocks("sh")[0].splitlines()
    assert README.index("```sh") < 200
    assert main_job.endswith("&& python examples/quickstart.py")
    assert tests.endswith("&& python -m pytest")


@pytest.mark.full
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
    assert np.asarray(sampling["image"]).shape == (64, 64, 3)
    assert type(guidance["pipe"].default_guider).__name__ == "AdaptiveProjectedGuidance"
    assert guidance["image_to_image"].default_guidance_rescale == 0.7


def commands(module, among=None):
    """Arguments of the README's commands that run a module of ours, line by line; of one block, or of all."""
    text = "".join(blocks("sh")) if among is None else among
    words = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [line[line.index(module) + 1 :] for line in words if module in line]


@pytest.mark.full
def test_the_page_of_retraining_is_enough(base_folder, image_folder, tmp_path, monkeypatch, capsys):
    """Its commands, in their order, on a small base and small images, with a server in the Hub's place."""
    page = next(block for block in blocks("sh") if "--push_to_hub" in block)
    rehearsal, training = (parse_config(line) for line in commands("zsnr_diffusers.training", page))
    shutil.copytree(image_folder, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_MEASURED_STEPS", 2)
    monkeypatch.setattr(api, "ALL_STEPS", range(1, 9))  # every number of steps takes minutes
    small = {
        **{"pretrained_model_name_or_path": str(base_folder), "resolution": 64, "mixed_precision": "no"},
        **{"max_train_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0},
        **{"luminance_images": 2, "num_inference_steps": 2},
    }
    repos = {}
    with in_place_of_the_hub(monkeypatch, repos=repos, made={}, new=tmp_path / "hub"):
        for config in (rehearsal, training):
            train(dataclasses.replace(config, **small))
    assert "images/s" in capsys.readouterr().out
    pushed = {path.name for path in repos["acme/sd21-zsnr"].iterdir()}
    assert {"model_index.json", "README.md", "luminance.png"} <= pushed
    lines = commands("zsnr", page)
    assert [line[0] for line in lines] == ["audit", "evaluate", "convert"]
    for line in lines:
        few = {"evaluate": ["--num_images=6", "--num_inference_steps=2"]}.get(line[0], [])
        untrained = "--deep" in line  # after two steps
        assert zsnr([*line, *few]) == untrained, capsys.readouterr()
    assert {"sd21-zsnr.safetensors", "brightness.png", "grid.png"} <= {path.name for path in tmp_path.iterdir()}


SCRIPTS = sorted(set(re.findall(r"python (examples/[\w/]+\.py)", README)))
START_ALL = """
import contextlib, io, os, runpy, sys
for script in sys.argv[1:]:
    paths, loaded, said = [*sys.path], {*sys.modules}, io.StringIO()
    sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(os.path.abspath(script))
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, (script, ended.code)
    assert "usage: " in said.getvalue(), script
    sys.path[:] = paths
    for name in {*sys.modules} - loaded:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(os.path.abspath("examples")):
            del sys.modules[name]  # another script may have to find it by itself
"""


@pytest.mark.full
def test_examples_start_as_they_are_called():
    """Without the paths that tests add; in one process, since most of the time goes into importing libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", START_ALL, *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(SCRIPTS) > 10


def test_the_training_commands_parse():
    configs = [parse_config(line, PixelTrainingConfig) for line in commands("zsnr_diffusers.training.pixels")]
    assert [(config.unet, config.rescale_betas_zero_snr) for config in configs] == [
        ("ddpm-cifar10", True),
        ("ddpm-cifar10", False),
    ]


def test_the_commands_parse(capsys):
    lines = commands("zsnr") + commands("zsnr_diffusers.cli")
    names = {"evaluate", "audit", "convert", "extract-lora", "calibrate", "fit-start"}
    assert {arguments[0] for arguments in lines} == names
    assert len(lines) == 15
    for arguments in lines:
        # everything is accepted up to the folder or file, which is not here
        assert zsnr(arguments) == 2
        files = ("--real", "--reference", "--prompts_file", "--train_data_dir")
        needed = next((option for option in files if option in arguments), arguments[0])
        assert arguments[arguments.index(needed) + 1] in capsys.readouterr().err


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()

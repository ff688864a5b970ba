import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from published_models import shallow_unet
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.calibration import calibrator as module
from zsnr_diffusers.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_stable_diffusion()
    pipe.unet = shallow_unet(pipe.unet.config)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a landscape of {i} hills\n\n" for i in range(8)), encoding="utf-8")
    return path


def run(model, prompts, tmp_path, *more, steps=("3",)):
    small = ["--num_prompts", "8", "--teacher_steps", "12", "--guidance_scale", "3", "--device", "cpu"]
    arguments = [model, "--prompts_file", prompts, "--output_dir", tmp_path / "fast", "--steps", *steps, *small, *more]
    return main(["calibrate", *map(str, arguments)])


@pytest.mark.full
def test_from_a_folder_to_a_scheduler_that_is_used(model, prompts, tmp_path, capsys):
    assert run(model, prompts, tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("at most ")
    assert out[1].startswith("about ")
    assert out[-1] == (
        f'pipe.scheduler = ZeroSNRMultistepScheduler.from_pretrained("{(tmp_path / "fast/scheduler").as_posix()}")'
    )
    report = json.loads((tmp_path / "fast" / "report.json").read_text())
    assert [one["num_inference_steps"] for one in report["numbers"]] == [3]
    assert report["numbers"][0]["kept"] is True
    scheduler = ZeroSNRMultistepScheduler.from_pretrained(tmp_path / "fast" / "scheduler")
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == report["numbers"][0]["timesteps"]

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
    image = pipe("a landscape of 3 hills", **call).images[0]
    picture = Image.open(tmp_path / "fast" / "calibration.png")
    assert picture.size == (4 + 4 * 100, 22 + 2 * 100)  # prompts, default, calibrated, teacher; a line above two rows
    cell = picture.crop((204, 22, 300, 118))
    assert np.abs(np.asarray(cell).astype(int) - np.asarray(ImageOps.pad(image, (96, 96)))).max() <= 2


@pytest.mark.full
def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(model, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.Calibrator, "seconds_per_call", lambda self: 30.0)
    assert run(model, prompts, tmp_path, "--dry_run") == 0
    calls, call, whole = capsys.readouterr().out.splitlines()
    number = int(calls.removeprefix("at most ").split()[0])
    assert (call, whole) == ("30 s a call", f"about {number // 120} h {number % 120 // 2} min at most")
    assert not (tmp_path / "fast").exists()


@pytest.mark.full
def test_an_interrupted_run_keeps_what_it_has(model, prompts, tmp_path, monkeypatch):
    fit = module.fit_steps

    def interrupted(student, starts):
        if len(starts[0]) == 4:
            raise KeyboardInterrupt
        return fit(student, starts)

    monkeypatch.setattr(module, "fit_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, prompts, tmp_path, steps=("4", "3"))
    scheduler = ZeroSNRMultistepScheduler.from_pretrained(tmp_path / "fast" / "scheduler")
    assert {*scheduler.config["calibration"]} == {"3"}
    assert len(json.loads((tmp_path / "fast" / "report.json").read_text())["numbers"]) == 1


@pytest.mark.full
def test_1_where_nothing_got_better(model, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.CalibratedNumber, "better", False)
    assert run(model, prompts, tmp_path) == 1
    assert "no step count improved" in capsys.readouterr().out
    assert not ZeroSNRMultistepScheduler.from_pretrained(tmp_path / "fast" / "scheduler").config["calibration"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (None, [], "no such file"),
        ("\n \n", [], "contains no prompts; write one per line"),
        ("a\nb\nc\n", [], "3 prompts are too few to fit and hold out: pass at least 8"),
        ("a\n" * 8, ["--num_prompts", "4"], "4 num_prompts are too few"),
        ("a\n" * 8, ["--steps", "1"], "--steps 1 must be at least 2"),
        ("a\n" * 8, ["--guidance_rescale", "2"], "--guidance_rescale 2.0 must lie in [0, 1]"),
        ("a\n" * 8, ["--keep_low_frequencies", "-1"], "--keep_low_frequencies -1 must be an integer"),
        ("a\n" * 8, ["--resolution", "63"], "have to be divisible by 8"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(text, more, message, model, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert run(model, path, tmp_path, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zsnr calibrate: error: ")
    assert message in error
    assert not (tmp_path / "fast").exists()


def test_without_prompts_or_place_it_does_not_parse(model, capsys):
    for arguments in ([str(model)], [str(model), "--prompts_file", "x"]):
        with pytest.raises(SystemExit):
            main(["calibrate", *arguments])
        assert "are required" in capsys.readouterr().err

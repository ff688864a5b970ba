"""The examples run whole at tiny sizes; what they show at full size is printed by themselves."""

import json

import pixel_landscapes
import pytest
import quickstart
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image

from zsnr_diffusers.start import Start

TINY = quickstart.Sizes(images=24, vae_steps=2, flawed_steps=2, retrained_steps=2, seeds=2, num_inference_steps=2)


@pytest.mark.full
def test_quickstart_trains_compares_and_draws_and_goes_on_where_it_was(tmp_path, capsys):
    figures = quickstart.main(tmp_path, sizes=TINY)
    text = capsys.readouterr().out
    arms = {"flawed: epsilon, stock schedule", "flawed, with a start: nothing trained", "v-loss on the stock schedule"}
    assert set(figures) > {*arms, "data"}
    for name, row in figures.items():
        assert name in text
        assert -1 <= row["p5"] <= row["p95"] <= 1
    for word in ("black", "dark", "dim", "grey", "bright", "white"):
        assert f"a {word} landscape" in text
    with Image.open(tmp_path / "samples.png") as sheet, Image.open(tmp_path / "brightness.png"):
        assert sheet.width > 3 * 2 * 64
    start = Start.load(tmp_path / "start.safetensors")
    assert start.base == "flawed"
    assert start.law.num_features == 64
    schedulers = {
        arm: DiffusionPipeline.from_pretrained(tmp_path / arm).scheduler
        for arm in ("flawed", "v-stock-schedule", "retrained")
    }
    assert schedulers["flawed"].config.prediction_type == "epsilon"
    assert schedulers["flawed"].config.timestep_spacing == "leading"
    assert schedulers["v-stock-schedule"].config.prediction_type == "v_prediction"
    assert schedulers["v-stock-schedule"].alphas_cumprod[-1] == schedulers["flawed"].alphas_cumprod[-1]
    assert type(schedulers["retrained"]) is EulerDiscreteScheduler
    assert schedulers["retrained"].config.rescale_betas_zero_snr
    index = json.loads((tmp_path / "retrained" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert quickstart.main(tmp_path, sizes=TINY) == figures


@pytest.mark.full
def test_pixel_mode_trains_compares_and_draws(tmp_path, capsys):
    sizes = pixel_landscapes.Sizes(images=24, steps=2, samples=4, num_inference_steps=2)
    coverages = pixel_landscapes.main(tmp_path, sizes=sizes)
    text = capsys.readouterr().out
    assert len(coverages) == 3
    assert all(name in text for name in coverages)
    assert (tmp_path / "brightness-pixels.png").exists()
    assert (tmp_path / "samples-pixels.png").exists()

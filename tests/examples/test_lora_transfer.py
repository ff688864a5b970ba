import lora_transfer
import numpy as np
import pytest
import torch
from landscapes import BRIGHTNESS_WORDS, landscape, make_landscapes
from PIL import Image
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.schedulers.stock import stock_scheduler


def scenes(season, brightnesses, seeds):
    return [
        landscape(value, np.random.default_rng([seed, 1]), season=season) for value in brightnesses for seed in seeds
    ]


@pytest.mark.parametrize("season", ["autumn", "winter"])
def test_style_is_that_of_the_season_whatever_the_brightness(season):
    even = np.linspace(-0.95, 0.95, 9)
    own, of_base = (lora_transfer.PaletteCurve.of(scenes(one, even, range(24))) for one in (season, "summer"))
    for brightness in (-0.6, 0.0, 0.6):
        shown = [scenes(one, [brightness], range(24, 48)) for one in ("summer", season)]
        # the hills, lakes and suns of two dozen scenes differ from those of two dozen others
        assert [lora_transfer.style(images, own, of_base) for images in shown] == pytest.approx([0, 1], abs=0.15)
    assert lora_transfer.style(shown[1], of_base, of_base) == 0


def test_the_whole_difference_and_the_scheduler_of_what_is_added():
    pipes = [tiny_stable_diffusion(flawed_scheduler()) for _ in range(3)]
    target, added, subtracted = pipes
    with torch.no_grad():
        for number, pipe in enumerate(pipes):
            pipe.unet.conv_in.bias.fill_(10.0**number)
    pipe = lora_transfer.add_difference(target, added, subtracted)
    assert pipe.scheduler is added.scheduler
    assert torch.equal(pipe.unet.conv_in.bias, torch.full_like(pipe.unet.conv_in.bias, 1 + 10 - 100))
    assert torch.equal(pipe.unet.conv_out.weight, target.unet.conv_out.weight)
    assert target.unet.conv_in.bias[0] == 1


@pytest.mark.slow
def test_prints_and_draws(tmp_path, capsys):
    flawed = tiny_stable_diffusion(flawed_scheduler())
    flawed.save_pretrained(tmp_path / "quickstart" / "flawed")
    with torch.no_grad():
        for weight in flawed.unet.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    flawed.scheduler = stock_scheduler(flawed.scheduler, prediction_type="v_prediction")
    flawed.save_pretrained(tmp_path / "quickstart" / "retrained")
    make_landscapes(tmp_path / "quickstart" / "landscapes", 30, 64)
    options = {"images": 30, "finetune_steps": 2, "lora_steps": 2, "pictures": 2, "steps": 2}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    places = ["--quickstart", str(tmp_path / "quickstart"), "--output_dir", str(tmp_path / "transfer")]
    figures = lora_transfer.main([*arguments, *places, "--ranks", "2", "--lora_ranks", "2"])
    text = capsys.readouterr().out
    assert list(figures) == ["base", "autumn", "winter", "winter-captioned"]
    for target, rows in figures.items():
        assert list(rows)[1:4] == ["trained LoRA, rank 2", "extracted LoRA, rank 2", "whole difference"]
        for name, row in rows.items():
            assert f"{target}: {name}" in text
            assert all(np.isfinite([*row.values()]))
            assert 0 <= row["share"] <= 1
        with Image.open(tmp_path / "transfer" / f"{target}.png") as image:
            assert image.width > len(BRIGHTNESS_WORDS) * 64

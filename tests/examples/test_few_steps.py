import few_steps
import numpy as np
import pytest
from landscapes import make_landscapes
from PIL import Image
from tiny_adapters import add_adapter
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import enable_guidance_rescale, save_lora, save_pipeline


def test_contrast_is_within_images_and_not_between_them():
    plain = [Image.new("RGB", (8, 8), color) for color in ("black", "white")]
    assert few_steps.contrast(plain) == 0
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    assert few_steps.contrast([Image.fromarray(half), plain[0]]) == pytest.approx(0.5)


@pytest.mark.full
def test_the_table_of_a_small_model(tmp_path, capsys):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.7, keep_low_frequencies=4)
    save_pipeline(pipe, tmp_path / "base")
    add_adapter(pipe.unet, rank=2)
    save_lora(pipe, tmp_path / "lora")
    make_landscapes(tmp_path / "data", 30, 64)
    sizes = few_steps.Sizes(seeds=2, repetitions=2, steps=2, teacher_steps=3, reference_steps=2)
    figures = few_steps.main(tmp_path / "base", tmp_path / "lora", tmp_path / "data", 3.0, sizes)
    printed = capsys.readouterr().out.splitlines()
    rows = {name: next(line for line in printed if line.startswith(name)) for name in figures}
    calls = {name: int(line[58:64]) for name, line in rows.items()}
    assert calls["teacher, Euler, 3 steps, guidance 3"] == 6
    assert calls["LoRA, Euler, 2 steps"] == 2
    assert len(figures) == 7
    # the same sampler in as many steps
    assert figures["teacher, ours, 2 steps, guidance 3"]["distance"] == 0
    assert min(row["distance"] for name, row in figures.items() if "ours" not in name) > 0

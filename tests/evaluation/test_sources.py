import json

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers.evaluation import folder_luminance, generate_images, mean_luminance, pipeline_luminance
from zsnr_diffusers.images import ImageError, find_images


def fill(folder, greys):
    folder.mkdir(exist_ok=True)
    for i, grey in enumerate(greys):
        Image.new("L", (2, 2), grey).save(folder / f"{i}.png")
    return folder


def test_folder_in_the_order_of_its_paths(tmp_path):
    values, skipped = folder_luminance(fill(tmp_path, [0, 51, 255]))
    assert values == pytest.approx([-1, -0.6, 1])
    assert skipped == []


def test_bad_image_fails_with_a_remedy_or_is_skipped_and_counted(tmp_path, capsys):
    fill(tmp_path, [0, 255])
    (tmp_path / "0a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=r"0a\.png.*--on_bad_image skip"):
        folder_luminance(tmp_path)
    values, skipped = folder_luminance(tmp_path, "skip")
    assert values == pytest.approx([-1, 1])
    assert skipped == [str(tmp_path / "0a.png")]
    error = capsys.readouterr().err
    assert "0a.png" in error
    assert "skipped 1 of 3 images" in error


def test_folder_without_readable_images(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        folder_luminance(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="none of the 1 images"):
        folder_luminance(tmp_path, "skip")


def test_prompts_share_seeds_and_images(tmp_path):
    pipe, prompts = tiny_stable_diffusion(), ["black cat", "white snow"]
    values, groups = pipeline_luminance(pipe, prompts, 5, seed=7, num_inference_steps=1)
    assert groups == ["black cat", "white snow"] * 2 + ["black cat"]
    expected = generate_images(pipe, groups, [7, 7, 8, 8, 9], num_inference_steps=1)
    assert values == pytest.approx(mean_luminance(expected), abs=1e-9)


def test_saved_images_are_the_measured_ones(tmp_path):
    folder = tmp_path / "new" / "samples"
    values, groups = pipeline_luminance(
        tiny_unconditional(), None, 3, seed=4, save_images=folder, num_inference_steps=1
    )
    assert groups == [None] * 3
    assert folder_luminance(folder)[0] == pytest.approx(values)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"00000{i}.png", "text": None, "seed": 4 + i} for i in range(3)]


def test_folder_that_holds_images_is_refused(tmp_path):
    fill(tmp_path, [0])
    with pytest.raises(ValueError, match="already holds images"):
        pipeline_luminance(tiny_unconditional(), None, 1, save_images=tmp_path)
    assert len(find_images(tmp_path)) == 1


def test_grid_shows_each_image_in_the_place_of_its_prompt_and_seed(tmp_path):
    pipe, samples = tiny_unconditional(), tmp_path / "samples"
    pipeline_luminance(pipe, None, 10, save_images=samples, grid=tmp_path / "g.png", num_inference_steps=1)
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.size == (8 * 12 + 4, 16)  # at most eight seeds of 8 pixels
        for i in range(8):
            with Image.open(samples / f"{i:06d}.png") as sample:
                assert np.array_equal(grid.crop((4 + 12 * i, 4, 12 + 12 * i, 12)), sample)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pipeline_luminance(tiny_unconditional(), None, 0)

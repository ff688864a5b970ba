import copy
import json
import weakref

import numpy as np
import pytest
from PIL import Image
from thread_processes import in_threads
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers.evaluation import (
    CustomFeatures,
    generate_images,
    image_features,
    mean_luminance,
    measure_folder,
    measure_images,
    measure_pipeline,
)
from zsnr_diffusers.utils.images import ImageError, find_images

NETWORK = CustomFeatures(lambda images: (images[:, :, 0, 0].float(), images.float().mean((2, 3))), "tiny")


def fill(folder, greys):
    folder.mkdir(exist_ok=True)
    for i, grey in enumerate(greys):
        Image.new("L", (2, 2), grey).save(folder / f"{i}.png")
    return folder


def test_folder_in_the_order_of_its_paths(tmp_path):
    measured = measure_folder(fill(tmp_path, [0, 51, 255]))
    assert measured.luminance == pytest.approx([-1, -0.6, 1])
    assert measured.skipped == []
    assert measured.features is None


def test_bad_image_fails_with_a_remedy_or_is_skipped_and_counted(tmp_path, capsys):
    fill(tmp_path, [0, 255])
    (tmp_path / "0a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=r"0a\.png.*--on_bad_image skip"):
        measure_folder(tmp_path)
    measured = measure_folder(tmp_path, on_bad_image="skip")
    assert measured.luminance == pytest.approx([-1, 1])
    assert measured.skipped == [str(tmp_path / "0a.png")]
    error = capsys.readouterr().err
    assert "0a.png" in error
    assert "skipped 1 of 3 images" in error


def test_folder_without_readable_images(tmp_path):
    with pytest.raises(ValueError, match="contains no images"):
        measure_folder(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="none of the 1 images"):
        measure_folder(tmp_path, on_bad_image="skip")


def test_prompts_share_seeds_and_images(tmp_path):
    pipe, prompts = tiny_stable_diffusion(), ["black cat", "white snow"]
    measured, groups = measure_pipeline(pipe, prompts, 5, seed=7, num_inference_steps=1)
    assert groups == ["black cat", "white snow"] * 2 + ["black cat"]
    expected = generate_images(pipe, groups, [7, 7, 8, 8, 9], num_inference_steps=1)
    assert measured.luminance == pytest.approx(mean_luminance(expected), abs=1e-9)


def test_saved_images_are_the_measured_ones(tmp_path):
    folder = tmp_path / "new" / "samples"
    measured, groups = measure_pipeline(
        tiny_unconditional(), None, 3, seed=4, save_images=folder, num_inference_steps=1
    )
    assert groups == [None] * 3
    assert measure_folder(folder).luminance == pytest.approx(measured.luminance)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"00000{i}.png", "text": None, "seed": 4 + i} for i in range(3)]


def test_folder_that_holds_images_is_refused(tmp_path):
    fill(tmp_path, [0])
    with pytest.raises(ValueError, match="already contains images"):
        measure_pipeline(tiny_unconditional(), None, 1, save_images=tmp_path)
    assert len(find_images(tmp_path)) == 1


def test_grid_shows_each_image_in_the_place_of_its_prompt_and_seed(tmp_path):
    pipe, samples = tiny_unconditional(), tmp_path / "samples"
    measure_pipeline(pipe, None, 10, save_images=samples, grid=tmp_path / "g.png", num_inference_steps=1)
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.size == (8 * 12 + 4, 16)  # at most eight seeds of 8 pixels
        for i in range(8):
            with Image.open(samples / f"{i:06d}.png") as sample:
                assert np.array_equal(grid.crop((4 + 12 * i, 4, 12 + 12 * i, 12)), sample)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure_pipeline(tiny_unconditional(), None, 0)


# With a network, and over several processes


def test_one_pass_for_luminance_and_features():
    """An iterator can be read but once, and is all there is."""
    images = generate_images(tiny_unconditional(), None, range(5), num_inference_steps=1)
    measured = measure_images(iter(images), NETWORK)
    assert measured.luminance == pytest.approx(mean_luminance(images))
    expected = image_features(NETWORK, images)
    assert np.array_equal(measured.features.features, expected.features)
    assert np.array_equal(measured.features.logits, expected.logits)
    assert measured.features.origin == NETWORK.origin


def test_generated_images_are_not_kept():
    made = []

    def generate():
        for i in range(100):
            image = Image.new("RGB", (2, 2), (i, i, i))
            made.append(weakref.ref(image))
            yield image
            assert sum(image() is not None for image in made) < 5

    assert len(measure_images(generate(), NETWORK).features.features) == 100


def test_sizes_may_differ_for_luminance_but_not_for_features(tmp_path):
    fill(tmp_path, [0, 255])
    Image.new("L", (3, 2)).save(tmp_path / "0a.png")
    assert len(measure_folder(tmp_path).luminance) == 3
    with pytest.raises(ValueError, match=r"0a\.png is 3x2, but .*0\.png is 2x2.*resize"):
        measure_folder(tmp_path, NETWORK)


@pytest.mark.parametrize("size", [2, 5])
def test_folder_over_several_processes(tmp_path, capsys, size):
    """More processes than images among them: some have nothing, or nothing that can be read."""
    fill(tmp_path, [0, 51, 102, 255])
    (tmp_path / "3.png").write_bytes(b"")
    one = measure_folder(tmp_path, NETWORK, "skip")
    capsys.readouterr()
    for measured in in_threads(size, lambda processes: measure_folder(tmp_path, NETWORK, "skip", processes)):
        assert np.array_equal(measured.luminance, one.luminance)
        assert np.array_equal(measured.features.features, one.features.features)
        assert np.array_equal(measured.features.logits, one.features.logits)
        assert measured.skipped == one.skipped == [str(tmp_path / "3.png")]
    assert capsys.readouterr().err.count("skipped 1 of 4 images") == 1


def test_errors_over_several_processes(tmp_path):
    fill(tmp_path, [0, 51, 102, 255])
    (tmp_path / "3.png").write_bytes(b"")
    for error in in_threads(3, lambda processes: measure_folder(tmp_path, processes=processes)):
        assert "3.png" in str(error)
    Image.new("L", (3, 2)).save(tmp_path / "3.png")
    for size in (2, 4):  # the other size among a process's own images, or alone
        for error in in_threads(size, lambda processes: measure_folder(tmp_path, NETWORK, processes=processes)):
            assert "3.png is 3x2, but" in str(error)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_pipeline_over_several_processes(tmp_path, size):
    """The same images, in the same files, whatever the number of processes."""
    pipe, prompts = tiny_stable_diffusion(), ["black cat", "white snow"]
    options = {"num_inference_steps": 1, "seed": 3}

    def measure(processes, folder):
        outputs = {"save_images": folder / "samples", "grid": folder / "grid.png"}
        return measure_pipeline(
            copy.deepcopy(pipe), prompts, 3, network=NETWORK, processes=processes, **outputs, **options
        )

    one, groups = measure(None, tmp_path / "one")
    for measured, found in in_threads(size, lambda processes: measure(processes, tmp_path / "several")):
        assert found == groups
        # Batches of other sizes round otherwise, which may move a pixel by one grey level in 255.
        assert measured.luminance == pytest.approx(one.luminance, abs=2 / 255)
        assert measured.features.features == pytest.approx(one.features.features, abs=1)
    assert names(tmp_path / "one") == names(tmp_path / "several")
    metadata = [(tmp_path / folder / "samples" / "metadata.jsonl").read_text() for folder in ("one", "several")]
    assert metadata[0] == metadata[1]
    for name in ("samples/000000.png", "samples/000001.png", "samples/000002.png", "grid.png"):
        with Image.open(tmp_path / "one" / name) as a, Image.open(tmp_path / "several" / name) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

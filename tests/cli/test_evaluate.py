import itertools
import json
from unittest import mock

import numpy as np
import pytest
from command_line import evaluate, fill, refused
from PIL import Image
from starts import quiet, strong_start
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

import zsnr_diffusers.utils.extras as extras
from zsnr_diffusers import enable_start, save_pipeline
from zsnr_diffusers.evaluation import measure_folder, terminal_invariance
from zsnr_diffusers.utils import image_formats


@pytest.fixture
def real(tmp_path):
    return fill(tmp_path / "real", [0, 51, 102, 255])


@pytest.fixture
def pipeline(tmp_path):
    tiny_unconditional().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def text_pipeline(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "text-pipeline")
    return tmp_path / "text-pipeline"


def test_two_folders(tmp_path, real, capsys):
    generated = fill(tmp_path / "generated", [51, 102, 153, 102])
    outputs = tmp_path / "out"
    call = ("--real", real, "--generated", generated)
    assert evaluate(*call, "--plot", outputs / "a.png", "--json", outputs / "a.json") == 0
    result = json.loads((outputs / "a.json").read_text())
    # Sorted greys 51 102 102 153 against 0 51 102 255: mean of 51, 51, 0, 102 grey levels.
    assert result["luminance"]["w1"] == pytest.approx(51 / 127.5)
    assert result["luminance"]["generated"]["n"] == result["luminance"]["real"]["n"] == 4
    assert result["luminance"]["real"]["max"] == pytest.approx(1)
    assert result["skipped"] == []
    assert result["settings"]["generated"] == str(generated)
    assert "Wasserstein-1 0.4000" in capsys.readouterr().out
    with Image.open(outputs / "a.png") as picture:
        assert picture.width > 100


def test_same_seed_same_report(real, capsys):
    assert evaluate("--real", real, "--generated", real) == 0
    first = capsys.readouterr().out
    assert evaluate("--real", real, "--generated", real) == 0
    assert capsys.readouterr().out == first
    assert "Wasserstein-1 0.0000" in first


def test_unconditional_pipeline(tmp_path, real, pipeline, capsys):
    options = ("--num_images", 3, "--num_inference_steps", 1, "--seed", 5, "--batch_size", 2, "--device", "cpu")
    outputs = ("--save_images", tmp_path / "samples", "--json", tmp_path / "a.json", "--grid", tmp_path / "g.png")
    assert evaluate("--real", real, "--pipeline", pipeline, *options, *outputs, "--invariance") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    saved = measure_folder(tmp_path / "samples").luminance
    assert result["luminance"]["generated"]["mean"] == pytest.approx(saved.mean())
    assert len(saved) == 3
    expected = terminal_invariance(tiny_unconditional(), seed=5)
    assert result["terminal_invariance"]["share"] == pytest.approx(expected.share, rel=1e-4)
    assert "prompt_share" not in result
    assert f"terminal invariance: {expected.share:.4f}" in capsys.readouterr().out
    assert (tmp_path / "g.png").exists()


@pytest.mark.full
def test_text_pipeline_with_a_file_of_prompts(tmp_path, real, text_pipeline, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffblack cat\n\n  white snow \n", encoding="utf-8")
    call = (
        "--real",
        real,
        "--pipeline",
        text_pipeline,
        "--num_images",
        4,
        "--num_inference_steps",
        1,
        "--device",
        "cpu",
    )
    from_file = (*call, "--prompts_file", tmp_path / "prompts.txt", "--json", tmp_path / "a.json")
    assert evaluate(*from_file, "--save_images", tmp_path / "samples") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert 0 <= result["prompt_share"]["share"] <= 1
    assert result["prompt_share"]["noise_alone"] == pytest.approx(1 / 3)
    assert "explained by the prompt: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["text"], row["seed"]) for row in rows] == [
        ("black cat", 0),
        ("white snow", 0),
        ("black cat", 1),
        ("white snow", 1),
    ]
    assert evaluate(*call, "--prompts", "black cat", "white snow", "--json", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "b.json").read_text())["luminance"] == result["luminance"]


@pytest.mark.full
def test_guidance_options_change_the_images(tmp_path, real, text_pipeline):
    call = ("--real", real, "--pipeline", text_pipeline, "--prompts", "black cat", "--num_images", 1)
    call += ("--num_inference_steps", 2, "--device", "cpu")
    images = []
    strong = ("--guidance_scale", 9)
    rescaled, kept = (*strong, "--guidance_rescale", 1), (*strong, "--keep_low_frequencies", 2)
    for i, options in enumerate([("--guidance_scale", 1), strong, rescaled, kept]):
        assert evaluate(*call, *options, "--save_images", tmp_path / str(i)) == 0
        with Image.open(tmp_path / str(i) / "000000.png") as image:
            images.append(np.asarray(image).astype(int))
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(images, 2))


def test_a_start_changes_the_images_of_an_epsilon_model(tmp_path, real, base_folder, capsys):
    strong_start(quiet("1.5")).save(tmp_path / "start.safetensors")
    sizes = ("--num_images", 2, "--num_inference_steps", 2, "--resolution", 64, "--device", "cpu")
    call = ("--real", real, "--pipeline", base_folder, "--prompts", "a", "b", *sizes)
    for name, more in (("plain", ()), ("started", ("--start", tmp_path / "start.safetensors"))):
        assert evaluate(*call, *more, "--save_images", tmp_path / name) == 0
    plain, started = (measure_folder(tmp_path / name).luminance for name in ("plain", "started"))
    assert np.abs(plain - started).max() > 1e-3
    saved = save_pipeline(enable_start(quiet("1.5"), tmp_path / "start.safetensors"), tmp_path / "saved")
    call_saved = [saved if argument == base_folder else argument for argument in call]
    for name, more, like in (("recorded", (), started), ("without", ("--no_start",), plain)):
        assert evaluate(*call_saved, *more, "--save_images", tmp_path / name) == 0
        # kernels round by how memory is aligned, and single pixels with them
        np.testing.assert_allclose(measure_folder(tmp_path / name).luminance, like, rtol=0, atol=1e-4)
    capsys.readouterr()
    assert "nowhere.safetensors" in refused(capsys, *call, "--start", tmp_path / "nowhere.safetensors")
    assert "--start: only with --pipeline" in refused(capsys, "--real", real, "--generated", real, "--start", "a")


def test_missing_folder(tmp_path, real, capsys):
    assert "nowhere" in refused(capsys, "--real", tmp_path / "nowhere", "--generated", real)
    assert "nowhere" in refused(capsys, "--real", real, "--generated", tmp_path / "nowhere")


def test_folder_without_images(tmp_path, real, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty' contains no images" in refused(capsys, "--real", real, "--generated", tmp_path / "empty")


def test_bad_image(tmp_path, real, capsys):
    (real / "bad.png").write_bytes(b"")
    message = refused(capsys, "--real", real, "--generated", real)
    assert "bad.png" in message
    assert "--on_bad_image skip" in message
    call = ("--real", real, "--generated", real, "--on_bad_image", "skip", "--json", tmp_path / "a.json")
    assert evaluate(*call) == 0
    assert json.loads((tmp_path / "a.json").read_text())["skipped"] == [str(real / "bad.png")] * 2
    assert "skipped 1 of 5 images" in capsys.readouterr().err


def test_pipeline_options_beside_a_folder_are_refused(real, capsys):
    message = refused(capsys, "--real", real, "--generated", real, "--num_images", 3, "--invariance")
    assert "--num_images, --invariance: only with --pipeline" in message


def test_pipeline_that_does_not_exist(real, tmp_path, capsys):
    assert "nowhere" in refused(capsys, "--real", real, "--pipeline", tmp_path / "nowhere", "--device", "cpu")


def test_full_folder_is_refused_before_the_pipeline_is_loaded(real, tmp_path, capsys):
    call = ("--real", real, "--pipeline", tmp_path / "nowhere", "--save_images", real)
    assert "already contains images" in refused(capsys, *call)


def test_wrong_values_for_a_pipeline(real, pipeline, tmp_path, capsys):
    call = ("--real", real, "--pipeline", pipeline, "--device", "cpu")
    assert "unconditional" in refused(capsys, *call, "--prompts", "a cat")
    assert "does not take guidance_scale" in refused(capsys, *call, "--guidance_scale", 3)
    assert "--guidance_rescale 0.7" in refused(capsys, *call, "--guidance_rescale", 0.7)
    assert "--keep_low_frequencies 2" in refused(capsys, *call, "--keep_low_frequencies", 2)
    assert "got 0" in refused(capsys, *call, "--num_images", 0)
    assert "already contains images" in refused(capsys, *call, "--save_images", real)
    (tmp_path / "prompts.txt").write_text("\n")
    assert "contains no prompts" in refused(capsys, *call, "--prompts_file", tmp_path / "prompts.txt")


def test_missing_extra_is_named_before_anything_is_read(tmp_path, capsys, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module.split(".")[0])

    monkeypatch.setattr(extras, "import_module", missing)
    message = refused(capsys, "--real", tmp_path / "nowhere", "--generated", tmp_path / "nowhere")
    assert "scipy is needed" in message
    assert "pip install 'zsnr_diffusers[eval]'" in message


def test_a_library_that_is_broken_itself_is_not_called_missing(monkeypatch):
    def broken(module):
        raise ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver")

    monkeypatch.setattr(extras, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="kiwisolver"):
        extras.import_extra("matplotlib.figure")


def test_formats_that_lack_a_package_are_named_before_work_starts_or_skipped(tmp_path, real, capsys, monkeypatch):
    monkeypatch.setattr(image_formats, "import_module", mock.Mock(side_effect=ImportError))
    monkeypatch.setattr(Image, "EXTENSION", {".png": "PNG"})
    image_formats.register_plugins.cache_clear()
    for name in ("a.heic", "b.HEIC", "c.jxl"):
        (real / name).write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40 if "h" in name.lower() else b"\xff\x0a")
    generated = fill(tmp_path / "generated", [51, 102])
    message = refused(capsys, "--real", real, "--generated", generated)
    assert "2 images in HEIC (.heic) need `pip install pillow-heif`; 1 image in JPEG XL (.jxl) needs" in message
    assert "--on_bad_image skip" in message
    assert evaluate("--real", real, "--generated", generated, "--on_bad_image", "skip") == 0
    said = capsys.readouterr().err
    assert "b.HEIC: HEIC needs `pip install pillow-heif`" in said
    assert "skipped 3 of 7 images" in said

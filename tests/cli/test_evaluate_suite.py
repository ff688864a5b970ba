import json

import numpy as np
import pytest
import torch
from command_line import evaluate, fill, refused
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.evaluation import brightness_score, load_suite, measure_folder, train_classifier

ROWS = [{"text": "black", "luminance": -0.9}, {"text": "grey", "luminance": 0}, {"text": "white", "luminance": 0.9}]


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "three.jsonl"


def test_a_suite_is_scored_without_real_images(tmp_path, text_pipeline, suite, capsys):
    call = ("--pipeline", text_pipeline, "--suite", suite, "--num_inference_steps", 1, "--device", "cpu")
    outputs = ("--save_images", tmp_path / "images", "--json", tmp_path / "a.json")
    assert evaluate(*call, *outputs, "--num_images", 4) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    measured = measure_folder(tmp_path / "images")
    score = brightness_score(
        load_suite(suite), ["black", "grey", "white", "black"], measured.luminance, measured.clipped
    )
    assert result["suite"]["adherence"] == pytest.approx(score.adherence)
    assert result["suite"]["error"] == pytest.approx(score.error)
    assert result["settings"]["suite"] == str(suite)
    assert f"prompt adherence     {score.adherence:.3f}" in capsys.readouterr().out
    assert evaluate(*call, "--json", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "b.json").read_text())["suite"]["images"] == 3


def test_what_is_wrong_with_a_suite_is_said_before_a_model_is_loaded(tmp_path, suite, capsys):
    call = ("--pipeline", tmp_path / "no-such-model")
    assert "'brighness' is neither a file nor one of brightness" in refused(capsys, *call, "--suite", "brighness")
    assert "--num_images 2: the suite" in refused(capsys, *call, "--suite", suite, "--num_images", 2)
    assert "pass only one of --suite, --prompts" in refused(capsys, *call, "--suite", suite, "--prompts", "a")
    real = fill(tmp_path / "real", [0, 255])
    assert "--suite: only with --pipeline" in refused(capsys, "--generated", real, "--suite", suite)


def test_a_classifier_of_one_kind_of_images(tmp_path, capsys):
    weights, real = tmp_path / "c.safetensors", tmp_path / "real"
    pixels = np.random.default_rng(0).integers(256, size=(80, 8, 8), dtype=np.uint8)
    labels = torch.arange(80) % 4
    sha256 = train_classifier(torch.from_numpy(pixels)[:, None], labels, weights, "noise", epochs=1, batch_size=32)
    real.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(real / f"{i}.png")
    call = ("--real", real, "--generated", real, "--fid", "--is", "--features", "classifier", "--device", "cpu")
    named = ("--feature_weights", weights, "--feature_sha256", sha256)
    assert evaluate(*call, *named, "--save_reference", tmp_path / "r.safetensors") == 0
    report = capsys.readouterr().out
    assert "Fréchet distance" in report
    assert f"classifier noise, Pillow bicubic to 8, sha256 {sha256[:12]}" in report
    assert "needs its file: --feature_weights FILE" in refused(capsys, *call)
    assert "expected 00" in refused(capsys, *call, "--feature_weights", weights, "--feature_sha256", "00")

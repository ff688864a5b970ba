import dataclasses
import json
import shlex

import ablation
import fashion_mnist
import judge
import numpy as np
import pytest
import tiny_fashion_mnist
from arms import ARMS, BUDGETS, PARTS, Arm, Cell, cells, sampler
from command_line import evaluate
from fashion_mnist import read_fashion_mnist
from PIL import Image

from zsnr_diffusers.evaluation import load_reference
from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.utils.hashing import file_sha256


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_fashion_mnist.write(tmp_path_factory.mktemp("data") / "fashion-mnist", train=120, test=80)


@pytest.fixture
def damaged(tmp_path):
    return tiny_fashion_mnist.write(tmp_path / "damaged", test=20)


def test_images_are_padded_and_halved(source):
    large, small = (read_fashion_mnist(str(source), "test", size) for size in (32, 16))
    assert large.images.shape == (80, 32, 32)
    assert small.images.shape == (80, 16, 16)
    assert large.labels.tolist() == [i % 10 for i in range(80)]
    raw = large.images[:, 2:-2, 2:-2].astype(int)
    assert large.images.sum() == raw.sum() > 0
    blocks = (raw[:, ::2, ::2] + raw[:, 1::2, ::2] + raw[:, ::2, 1::2] + raw[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(small.images[:, 1:-1, 1:-1], blocks, atol=0.5)


def test_without_data_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEFAULT_FOLDER", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        read_fashion_mnist(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        read_fashion_mnist(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="is no folder, and is not available on the Hub"):
        read_fashion_mnist("me/no-such-clothes", "train")


def test_damaged_files_are_refused(damaged):
    images = damaged / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content, message in (
        (whole[:-20], "is truncated or damaged"),
        (whole[:40] + bytes(30) + whole[70:], "is truncated or damaged"),
        (b"not gzip", "is truncated or damaged"),
        (tiny_fashion_mnist.gzip.compress(b"\x00\x00\x0d\x03" + bytes(20)), "is no idx file of bytes"),
        (tiny_fashion_mnist.gzip.compress(b""), "is no idx file of bytes"),
        (tiny_fashion_mnist.gzip.compress(b"\x00\x00\x08\x03\x00\x00"), "its header says"),
        (_one_short(), "its header says"),
        (tiny_fashion_mnist.idx(np.zeros((20, 27, 28))), "it is not Fashion-MNIST"),
        (tiny_fashion_mnist.idx(np.zeros((19, 28, 28))), "it is not Fashion-MNIST"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_fashion_mnist(str(damaged), "test")
    images.write_bytes(whole)
    assert len(read_fashion_mnist(str(damaged), "test").labels) == 20


def _one_short():
    """A file with a byte less than its header says."""
    whole = tiny_fashion_mnist.gzip.decompress(tiny_fashion_mnist.idx(np.zeros((20, 28, 28))))
    return tiny_fashion_mnist.gzip.compress(whole[:-1])


def test_the_classifier_that_is_kept_is_the_one_that_is_named():
    assert file_sha256(judge.CLASSIFIER) == judge.CLASSIFIER_SHA256
    reference = load_reference(judge.REFERENCE)
    assert reference.origin.sha256 == judge.CLASSIFIER_SHA256
    assert reference.count == 10_000
    assert judge.CLASSIFIER.stat().st_size + judge.REFERENCE.stat().st_size < 500_000


def test_another_classifier_is_refused(source, tmp_path, monkeypatch):
    test = read_fashion_mnist(str(source), "test", 16)
    other = tmp_path / judge.CLASSIFIER.name
    made = judge.make_classifier(read_fashion_mnist(str(source), "train", 16), test, other, epochs=0)
    assert made["sha256"] == file_sha256(other)
    with pytest.raises(ValueError, match=f"has sha256 {made['sha256']}, expected {judge.CLASSIFIER_SHA256}"):
        judge.Judge(test, other)
    judge.Judge(test, other, made["sha256"])
    judge.reference_of(other).write_bytes(judge.REFERENCE.read_bytes())
    with pytest.raises(ValueError, match="compute both with the same network"):
        judge.Judge(test, other, made["sha256"])


def test_the_judge_prefers_real_images(source):
    test = read_fashion_mnist(str(source), "test", 16)
    judged = judge.Judge(test)
    real, noise = (judged(images, test.labels.tolist()) for images in (test.pictures(), _noise(80)))
    assert real.w1 == 0
    assert (real.precision, real.recall) == (1, 1)
    assert noise.precision < 0.2
    assert noise.w1 > 5 * noise.floor
    assert noise.kernel_distance > real.kernel_distance


@pytest.mark.full
def test_the_command_for_others_gives_the_same_figures(source, tmp_path, capsys):
    page = (judge.HERE / "README.md").read_text(encoding="utf-8")
    line = next(line for line in page.replace("\\\n", " ").splitlines() if line.startswith("zsnr evaluate"))
    images, labels = _noise(80), [i % 10 for i in range(80)]
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "samples" / f"{i:03d}.png")
    words = [str(tmp_path / "samples") if word == "samples/" else word for word in shlex.split(line)[2:]]
    paths = [str(judge.HERE.parents[1] / word) if word.startswith("examples/") else word for word in words]
    assert evaluate(*paths, "--device", "cpu", "--json", tmp_path / "a.json") == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    row = judge.Judge(read_fashion_mnist(str(source), "test", 16))(images, labels)
    assert figures["fid"]["value"] == pytest.approx(row.frechet_distance, rel=1e-4)
    assert judge.CLASSIFIER_SHA256[:12] in capsys.readouterr().out


def _noise(n):
    pixels = np.random.default_rng(0).integers(256, size=(n, 16, 16), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_epsilon_at_zero_snr_is_the_refused_corner():
    with pytest.raises(ValueError, match="epsilon"):
        PixelTrainingConfig(train_data_dir="x", prediction_type="epsilon", rescale_betas_zero_snr=True)
    assert [(arm.prediction_type, arm.zero_snr) for arm in ARMS] == [
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction", True),
    ]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_samplers_differ_in_where_they_begin(arm):
    schedulers = {name: sampler(name, arm, BUDGETS["cpu"]) for name in ("leading", "trailing", "ours")}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(10)
        assert (scheduler.alphas_cumprod[-1] == 0) == arm.zero_snr
        assert scheduler.config.prediction_type == arm.prediction_type
    assert {name: int(one.timesteps[0]) for name, one in schedulers.items()} == {
        "leading": 901,
        "trailing": 999,
        "ours": 999,
    }


@pytest.mark.parametrize("name", BUDGETS)
def test_the_last_timestep_leaks_as_much_of_a_mean_as_stable_diffusion_s(name):
    budget = BUDGETS[name]
    ours = sampler("trailing", Arm("v", "v_prediction", False), budget)
    theirs = sampler("trailing", Arm("v", "v_prediction", False), dataclasses.replace(budget, beta_end=0.012))
    leaked = [
        pixels * float(one.alphas_cumprod[-1] / (1 - one.alphas_cumprod[-1]))
        for one, pixels in ((ours, budget.image_size**2), (theirs, 64**2))
    ]
    assert leaked[0] == pytest.approx(leaked[1], rel=0.01)


def test_no_cell_is_measured_twice():
    every = [cell for part in PARTS for cell in cells(part)]
    assert len({cell.name for cell in every}) == len(every) == 40


@pytest.mark.full
def test_it_trains_samples_judges_reports_and_goes_on(source, tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(BUDGETS["cpu"], train_steps=2, train_images=60, train_batch_size=4, samples=70)
    some = {"main": [Cell("leading", 2)], "unguided": [Cell("ours", 2, 1.0)]}
    some["guided"] = [Cell("trailing", 1, 3.0, 0.7, 4)]
    monkeypatch.setattr(ablation, "cells", lambda part: some[part])
    results = ablation.main(tmp_path, tiny, [0], str(source))
    assert len(results.rows) == 9
    assert all(row.n == 70 for row in results.rows.values())
    assert {name for name, _ in results.invariance} == {arm.name for arm in ARMS}
    assert results.real.n == 70
    tables = (tmp_path / "tables.md").read_text()
    assert judge.CLASSIFIER_SHA256[:12] in tables
    assert f"sha256 {judge.CLASSIFIER_SHA256}" in capsys.readouterr().out
    assert "| v-zero-snr | trailing | 1 | 3 | 0.7, 4 x 4 | 1 |" in tables
    with Image.open(tmp_path / "effects.png") as picture:
        assert picture.width > 500

    gone = tmp_path / "results" / "v-0" / f"{some['main'][0].name}.json"
    before = gone.read_text()
    gone.unlink()
    made = []
    generate = ablation.generate
    monkeypatch.setattr(ablation, "generate", lambda *given: made.append(given[2]) or generate(*given))
    again = ablation.main(tmp_path, tiny, [0], str(source))
    assert made == [some["main"][0]]
    assert gone.read_text() == before
    assert again == results

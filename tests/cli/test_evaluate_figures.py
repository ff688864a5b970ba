import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import evaluate, refused
from PIL import Image
from tiny_networks import save_scripted, sha256, tiny_dinov2, tiny_inception
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers.cli import measuring as command
from zsnr_diffusers.evaluation import (
    DinoV2Features,
    InceptionFeatures,
    frechet_distance,
    image_features,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Networks, a pipeline and folders of 8 x 8 noise; do not change them."""
    folder = tmp_path_factory.mktemp("evaluate")
    inception = save_scripted(tiny_inception(), folder / "tiny.pt")
    tiny_dinov2().save_pretrained(folder / "tiny-dino")
    tiny_unconditional().save_pretrained(folder / "pipeline")
    return SimpleNamespace(
        inception=inception,
        dinov2=folder / "tiny-dino",
        pipeline=folder / "pipeline",
        real=fill_with_noise(folder / "real", 24, high=256),
        generated=fill_with_noise(folder / "generated", 20, high=200),
        network=("--feature_weights", inception, "--feature_sha256", sha256(inception)),
    )


def fill_with_noise(folder, n, high, size=8):
    folder.mkdir()
    rng = np.random.default_rng(n)
    for i in range(n):
        Image.fromarray(rng.integers(high, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def figures(tmp_path, *arguments):
    assert evaluate(*arguments, "--json", tmp_path / "a.json") == 0
    return json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["figures"]


def test_figures_of_two_folders_are_those_of_the_functions(tmp_path, made, capsys):
    call = ("--real", made.real, "--generated", made.generated, "--fid", "--is", "--kid", "--is_splits", 3)
    found = figures(tmp_path, *call, *made.network, "--seed", 5)
    network = InceptionFeatures(made.inception, sha256=None)
    real, generated = image_features(network, made.real), image_features(network, made.generated)
    assert found["fid"]["value"] == frechet_distance(generated.statistics(), real.statistics())
    score = inception_score(generated.logits[np.random.default_rng(5).permutation(20)], splits=3)
    assert (found["is"]["value"], found["is"]["error"]) == (score.mean, score.std)
    distance = kernel_distance(generated.features, real.features)
    assert (found["kid"]["value"], found["kid"]["error"]) == (distance.value, distance.error)
    for name in ("fid", "kid"):
        assert (found[name]["generated"], found[name]["reference_count"]) == (20, 24)
        assert found[name]["reference"] == str(made.real)
        assert found[name]["origin"] == found[name]["reference_origin"]
        assert found[name]["origin"]["sha256"] == sha256(made.inception)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "generated" in line and "sha256" in line]
    assert [line.split(" ")[0] for line in lines] == ["Fréchet", "Inception", "Kernel"]  # it is not the FID network
    for line in lines:
        assert line.endswith(f"other inception, TensorFlow 1 bilinear to 299, sha256 {sha256(made.inception)[:12]})")
    assert "Wasserstein-1" in output


def test_dinov2(tmp_path, made, capsys):
    call = ("--real", made.real, "--generated", made.generated, "--fid", "--kid", "--features", "dinov2")
    found = figures(tmp_path, *call, "--feature_weights", made.dinov2)
    network = DinoV2Features(made.dinov2)
    real, generated = image_features(network, made.real), image_features(network, made.generated)
    assert found["fid"]["value"] == frechet_distance(generated.statistics(), real.statistics())
    assert found["kid"]["value"] == kernel_distance(generated.features, real.features).value
    output = capsys.readouterr().out
    assert (
        f"FD-DINOv2 {found['fid']['value']:.4g}  (20 generated, reference {made.real}: 24; dinov2 tiny-dino" in output
    )
    assert "KD-DINOv2" in output


def test_reference_in_a_file_gives_the_figure_of_the_folder(tmp_path, made, capsys):
    call = ("--generated", made.generated, "--fid", *made.network)
    saved = tmp_path / "new" / "train.safetensors"
    expected = figures(tmp_path, *call, "--real", made.real, "--save_reference", saved)["fid"]
    found = figures(tmp_path, *call, "--reference", saved)["fid"]
    assert found["value"] == pytest.approx(expected["value"], rel=1e-12)
    assert (found["reference"], found["reference_count"]) == (str(saved), 24)
    assert found["origin"] == expected["origin"]
    assert "luminance" not in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))

    features = image_features(InceptionFeatures(made.inception, sha256=None), made.real).features.astype(np.float64)
    np.savez(tmp_path / "train.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    capsys.readouterr()
    found = figures(tmp_path, *call, "--reference", tmp_path / "train.npz")["fid"]
    assert found["value"] == pytest.approx(expected["value"], rel=1e-6)  # a root of a rounded covariance
    assert found["reference_count"] is None
    assert "train.npz: unknown number by an unknown network" in capsys.readouterr().out


def test_reference_beside_real_images_is_what_the_frechet_distance_is_to(tmp_path, made):
    call = ("--generated", made.generated, "--fid", "--kid", *made.network)
    saved = tmp_path / "train.safetensors"
    figures(tmp_path, *call, "--real", made.generated, "--save_reference", saved)
    found = figures(tmp_path, *call, "--real", made.real, "--reference", saved)
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["fid"]["reference"] == str(saved)
    assert found["kid"]["reference"] == str(made.real)


def test_inception_score_alone_needs_no_real_images(tmp_path, made, capsys):
    assert figures(tmp_path, "--generated", made.generated, "--is", *made.network).keys() == {"is"}
    assert "Wasserstein" not in capsys.readouterr().out
    assert evaluate("--generated", made.generated, "--is", *made.network, "--plot", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").exists()


@pytest.mark.full
def test_subsets(tmp_path, made, monkeypatch):
    monkeypatch.setattr("zsnr_diffusers.evaluation.metrics.SUBSET_SIZE", 10)
    monkeypatch.setattr("zsnr_diffusers.cli.feature_networks.SUBSET_SIZE", 10)
    call = ("--real", made.real, "--generated", made.generated, "--kid", "--kid_subsets", 4, "--seed", 2)
    found = figures(tmp_path, *call, *made.network)["kid"]
    network = InceptionFeatures(made.inception, sha256=None)
    x, y = (image_features(network, folder).features for folder in (made.generated, made.real))
    assert found["value"] == kernel_distance_of_subsets(x, y, 4, 10, seed=2).value
    assert "4 subsets of 10" in found["method"]


def test_few_images_are_warned_of_in_one_line(tmp_path, made, capsys):
    few = fill_with_noise(tmp_path / "few", 4, high=256)
    assert evaluate("--real", made.real, "--generated", few, "--fid", *made.network) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zsnr evaluate: warning: Fréchet distance: 4 images for 8 features: ")
    assert "bias decreases as 1 / images" in line


def test_pipeline_is_measured_as_its_saved_images_are(tmp_path, made):
    call = ("--real", made.real, "--fid", "--is", "--kid", *made.network, "--device", "cpu")
    options = ("--num_images", 12, "--num_inference_steps", 1, "--batch_size", 5)
    found = figures(tmp_path, *call, "--pipeline", made.pipeline, *options, "--save_images", tmp_path / "samples")
    again = figures(tmp_path, *call, "--generated", tmp_path / "samples")
    assert found == again


@pytest.mark.full
def test_two_processes_give_the_figures_and_files_of_one(tmp_path, made):
    """accelerate launch, two processes over gloo."""
    call = ("--real", made.real, "--pipeline", made.pipeline, "--num_images", 11, "--num_inference_steps", 1)
    call += ("--fid", "--is", "--kid", *made.network, "--device", "cpu", "--seed", 3, "--invariance")

    def outputs(name):
        files = {"save_images": "samples", "grid": "grid.png", "json": "a.json", "save_reference": "a.safetensors"}
        return [part for option, file in files.items() for part in (f"--{option}", tmp_path / name / file)]

    assert evaluate(*call, *outputs("one")) == 0
    done = launch(*call, *outputs("two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wasserstein-1") == done.stdout.count("Fréchet distance") == 1
    assert names(tmp_path / "one") == names(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "a.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert [row["seed"] for row in metadata(tmp_path / "two")] == list(range(3, 14))
    assert metadata(tmp_path / "one") == metadata(tmp_path / "two")
    for name in (f"samples/{row['file_name']}" for row in metadata(tmp_path / "one")):
        with Image.open(tmp_path / "one" / name) as a, Image.open(tmp_path / "two" / name) as b:
            # Batches of other sizes round otherwise, which may move a pixel by one grey level.
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert two["luminance"]["w1"] == pytest.approx(one["luminance"]["w1"], abs=2 / 255)
    assert two["terminal_invariance"]["share"] == pytest.approx(one["terminal_invariance"]["share"])
    call = ("--real", made.real, "--generated", tmp_path / "two" / "samples", "--seed", 3)
    expected = figures(tmp_path, *call, "--fid", "--is", "--kid", *made.network)
    for name, figure in expected.items():
        # The same images; the network's float32 rounds otherwise in other batches.
        assert two["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-3)
        assert two["figures"][name]["generated"] == 11


@pytest.mark.full
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path, made):
    folder = fill_with_noise(tmp_path / "bad", 5, high=256)
    (folder / "99.png").write_bytes(b"")
    done = launch("--real", folder, "--generated", made.generated)
    assert done.returncode != 0
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("zsnr evaluate: error: ")]
    assert len(errors) == 1
    assert "process 1: cannot read image" in errors[0]
    assert "99.png" in errors[0]


def launch(*arguments):
    options = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port=0"]
    return subprocess.run(
        [*command, "-m", "zsnr_diffusers.cli", "evaluate", *map(str, arguments)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def metadata(folder):
    return [json.loads(line) for line in (folder / "samples" / "metadata.jsonl").read_text().splitlines()]


# -- what goes wrong, and is found before the expensive part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare with: pass --real FOLDER, --fid with --reference FILE, --is, or --suite"),
        (["--fid"], "--fid needs real images: --real FOLDER, or their statistics as --reference FILE"),
        (["--fid", "--reference", "r.npz", "--kid"], "--kid: only with --real, the images themselves"),
        (["--real", "r", "--reference", "r.npz"], "--reference: only with --fid"),
        (["--is", "--features", "dinov2"], "--is needs a classifier, which DINOv2 is not"),
        (["--real", "r", "--features", "dinov2", "--feature_sha256", "1"], "--features, --feature_sha256: only with"),
        (["--real", "r", "--is_splits", "3"], "--is_splits: only with --is"),
        (["--real", "r", "--kid_subsets", "3", "--fid"], "--kid_subsets: only with --kid"),
        (["--is", "--is_splits", "0"], "--is_splits must be at least 1, got 0"),
        (["--real", "r", "--kid", "--kid_subsets", "-1"], "--kid_subsets must be at least 0, got -1"),
        (["--real", "r", "--save_reference", "a.safetensors"], "--save_reference: only with --fid and --real"),
        (["--real", "r", "--fid", "--save_reference", "a.npz"], "'a.npz': statistics are written as .safetensors"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, arguments, message):
    assert message in refused(capsys, "--generated", "g", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--is", "--num_images", 9], "--is_splits needs at least 10 generated images, got 9"),
        (["--real", "r", "--kid", "--num_images", 2], "--kid needs at least 3 generated images, got 2"),
        (["--real", "r", "--kid", "--kid_subsets", 9], "--kid_subsets needs at least 1000 generated images, got 64"),
        (["--real", "r", "--fid", "--num_images", 1], "--fid needs at least 2 generated images, got 1"),
        (["--real", "r", "--num_images", 0], "--num_images must be at least 1, got 0"),
    ],
)
def test_too_few_images_to_generate(capsys, arguments, message):
    assert message in refused(capsys, "--pipeline", "p", *arguments)


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(command, "measure_folder", fail)
    monkeypatch.setattr(command, "measure_pipeline", fail)


@pytest.mark.usefixtures("nothing_is_measured")
def test_networks_and_references_are_checked_before_anything_is_measured(tmp_path, made, capsys):
    call = ("--generated", made.generated, "--fid")
    real = ("--real", made.real)
    assert "expected f58cb9b6ec32" in refused(capsys, *call, *real, "--feature_weights", made.inception)
    assert "none.pt" in refused(capsys, *call, *real, "--feature_weights", tmp_path / "none.pt")
    dinov2 = ("--features", "dinov2", "--feature_weights")
    assert "expected 00" in refused(capsys, *call, *real, *dinov2, made.dinov2, "--feature_sha256", "00")
    assert "none" in refused(capsys, *call, *real, *dinov2, tmp_path / "none")
    assert "none.npz" in refused(capsys, *call, "--reference", tmp_path / "none.npz", *made.network)
    assert "only with --pipeline" in refused(capsys, *call, *real, *made.network, "--num_images", 9)
    assert "does not take guidance_scale" in refused(
        capsys, *real, "--pipeline", made.pipeline, "--device", "cpu", "--guidance_scale", 3
    )


def test_reference_of_another_network_names_both(tmp_path, made, capsys, request):
    call = ("--generated", made.generated, "--fid")
    saved = tmp_path / "a.safetensors"
    assert evaluate(*call, "--real", made.real, *made.network, "--save_reference", saved) == 0
    capsys.readouterr()
    request.getfixturevalue("nothing_is_measured")
    dinov2 = ("--features", "dinov2", "--feature_weights", made.dinov2)
    message = refused(capsys, *call, "--reference", saved, *dinov2)
    assert "other inception (resize: TensorFlow 1" in message
    assert "dinov2 tiny-dino (resize: Pillow" in message
    np.savez(tmp_path / "a.npz", mu=np.zeros(8), sigma=np.eye(8))
    assert "has 8 features" in refused(capsys, *call, "--reference", tmp_path / "a.npz", *dinov2)


def test_bad_folders(tmp_path, made, capsys):
    mixed = fill_with_noise(tmp_path / "mixed", 4, high=256)
    Image.new("RGB", (9, 8)).save(mixed / "99.png")
    call = ("--fid", *made.network)
    assert "99.png is 9x8, but" in refused(capsys, "--real", mixed, "--generated", made.generated, *call)
    (mixed / "99.png").write_bytes(b"")
    assert "--on_bad_image skip" in refused(capsys, "--real", made.real, "--generated", mixed, *call)
    assert evaluate("--real", made.real, "--generated", mixed, *call, "--on_bad_image", "skip") == 0
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert "contains no images" in refused(capsys, "--real", tmp_path / "empty", "--generated", made.generated, *call)
    one = fill_with_noise(tmp_path / "one", 1, high=256)
    assert "--fid needs at least 2 real images, got 1" in refused(
        capsys, "--real", one, "--generated", made.generated, *call
    )


def test_weights_are_looked_for_in_the_cache_and_fetched(made, capsys, monkeypatch, tmp_path):
    """The network's own place is tests/evaluation/test_inception_weights.py; here, that it is asked."""
    import zsnr_diffusers.evaluation

    monkeypatch.setattr(zsnr_diffusers.evaluation, "inception_file", lambda: made.inception)
    call = ("--generated", made.generated, "--is")
    assert evaluate(*call, "--feature_sha256", sha256(made.inception)) == 0
    capsys.readouterr()
    assert "tiny.pt" in refused(capsys, *call)  # its hash is not the published one

import json
import shutil

import pytest
from PIL import Image
from starts import quiet
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import enable_start
from zsnr_diffusers.cli import main
from zsnr_diffusers.start import Start


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from landscapes import make_landscapes

    return make_landscapes(tmp_path_factory.mktemp("photos"), count=30, image_size=64)


def run(base, photos, tmp_path, *more):
    arguments = [
        base,
        "--train_data_dir",
        photos,
        "--output",
        tmp_path / "start.safetensors",
        "--device",
        "cpu",
        *more,
    ]
    return main(["fit-start", *map(str, arguments)])


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("zsnr fit-start: error: ") or "\n".join(lines).count("zsnr fit-start: error: ") == 1
    return "\n".join(lines)


def test_from_a_folder_to_a_start_that_is_used(base_folder, photos, tmp_path, capsys):
    status = run(base_folder, photos, tmp_path, "--cache_dir", tmp_path / "cache", "--noise", "0.5")
    out = capsys.readouterr().out
    start = Start.load(tmp_path / "start.safetensors")
    assert status == (0 if start.report["explained"][0][0] else 1)
    assert "30 images, 6 captions" in out
    assert (
        out.splitlines()[-1] == f'zsnr_diffusers.enable_start(pipe, "{(tmp_path / "start.safetensors").as_posix()}")'
    )
    assert start.base == base_folder.name  # no path of this machine
    assert start.law.noise == 0.5
    enable_start(quiet("1.5"), start)
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()} == {
        "start-prompts",
        "start-low-frequencies",
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    run(base_folder, photos, tmp_path, "--cache_dir", tmp_path / "cache", "--noise", "0.5")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == before
    assert Start.load(tmp_path / "start.safetensors").to_bytes() == start.to_bytes()


@pytest.mark.full
def test_caption_files_beside_images_and_no_captions_at_all(base_folder, photos, tmp_path, capsys):
    folder = tmp_path / "beside"
    folder.mkdir()
    for line in (photos / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        shutil.copy(photos / row["file_name"], folder)
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\nanother one")
    run(base_folder, folder, tmp_path)
    assert "30 images, 6 captions" in capsys.readouterr().out
    assert run(base_folder, photos, tmp_path, "--no_captions") == 0
    assert "without captions" in capsys.readouterr().out
    assert Start.load(tmp_path / "start.safetensors").law.num_features == 0


def test_what_is_wrong_is_said_in_a_line_before_a_model_is_loaded(photos, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64)).save(few / f"{i}.png")
        (few / f"{i}.txt").write_text("black")
    assert run("nowhere", few, tmp_path) == 2
    assert "3 images are too few to fit and hold out" in error_of(capsys)
    for i in range(30):
        Image.new("RGB", (64, 64)).save(few / f"{i}.png")
        (few / f"{i}.txt").write_text("black")
    assert run("nowhere", few, tmp_path) == 2
    assert "All 30 captions are 'black'" in error_of(capsys)
    (few / "7.png").write_bytes(b"nothing")
    assert run("nowhere", few, tmp_path) == 2
    assert "7.png" in error_of(capsys)
    assert run("nowhere", tmp_path / "none", tmp_path) == 2
    assert "none" in error_of(capsys)
    assert main(["fit-start", "nowhere", "--train_data_dir", str(photos), "--output", "start.pt"]) == 2
    assert "--output 'start.pt': a start is written as .safetensors" in error_of(capsys)
    assert not (tmp_path / "start.safetensors").exists()


def test_a_model_of_pure_noise_needs_none(photos, tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "zero")
    assert run(tmp_path / "zero", photos, tmp_path) == 2
    assert "ends in pure noise: its model needs no start" in error_of(capsys)
    assert run(tmp_path / "zero", photos, tmp_path, "--noise", "2") == 2
    assert "--noise 2.0 must lie in [0, 1]" in error_of(capsys)

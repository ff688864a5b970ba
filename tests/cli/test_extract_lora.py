"""`zsnr extract-lora`, in the test's own process."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import PHI, adapted, assert_paints_alike
from tiny_checkpoints import tiny_pipeline, write_file

from zsnr_diffusers import load_lora, save_pipeline
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline("1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """The base with a LoRA of rank 3 fused into it: its pipeline, and its folder."""
    pipe = adapted("1")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return pipe, save_pipeline(pipe, tmp_path_factory.mktemp("retrained") / "zsnr")


def extract(*arguments):
    return main(["extract-lora", *map(str, arguments)])


def refused(capsys, *arguments):
    assert extract(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1].removeprefix("zsnr extract-lora: error: ")


def test_writes_a_lora_and_prints_what_it_keeps(base, retrained, tmp_path, capsys):
    pipe, folder = retrained
    target = tmp_path / "lora"
    assert extract(folder, base, "--rank", 3, "--output_dir", target) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["network", "weights", "tensors", "of", "the", "difference", "kept"]
    assert {tuple(line.split()[:2]) for line in lines[1:3]} == {("unet", "linear"), ("unet", "convolution")}
    assert lines[-2].startswith("rank 3 keeps 100.00% of the difference")
    assert lines[-1] == f"written: {target}"
    assert {path.name for path in target.iterdir()} == {LORA_FILE, KOHYA_FILE, "scheduler"}
    applied = load_lora(tiny_pipeline("1"), target)
    assert applied.default_guidance_rescale == PHI
    assert_paints_alike(applied, pipe)


@pytest.mark.full
def test_one_file_of_two_files_in_half_precision(base, retrained, tmp_path):
    file, first = tmp_path / "zsnr.safetensors", write_file(tmp_path / "base.safetensors", "1")
    save_pipeline(retrained[0], file)
    target = tmp_path / "lora.safetensors"
    options = ["--config", base, "--dtype", "float16", "--guidance_rescale", 0]
    assert extract(file, first, "--rank", 3, *options, "--output_dir", target) == 0
    assert {value.dtype for key, value in load_file(target).items() if not key.endswith("alpha")} == {torch.float16}
    assert getattr(load_lora(tiny_pipeline("1"), target), "default_guidance_rescale", 0.0) == 0.0


def test_what_is_refused(base, retrained, tmp_path, capsys):
    target, (_, folder) = tmp_path / "lora", retrained
    assert "the rank of a LoRA must be at least 1" in refused(
        capsys, folder, base, "--rank", 0, "--output_dir", target
    )
    assert "pass --device cpu" in refused(capsys, folder, base, "--device", "mps", "--output_dir", target)
    assert "exceeds the rank of every layer" in refused(capsys, folder, base, "--rank", 9999, "--output_dir", target)
    assert "there is nothing to extract" in refused(capsys, base, base, "--output_dir", target)
    assert "--private requires" in refused(capsys, folder, base, "--output_dir", target, "--private")
    assert "cannot be read from the Hub" in refused(capsys, folder, tmp_path / "nothing", "--output_dir", target)
    silent = write_file(tmp_path / "silent.safetensors", "2")
    said = refused(capsys, silent, base, "--output_dir", target)
    schedule = "--rescale_betas_zero_snr or --no_rescale_betas_zero_snr"
    assert f"pass --prediction_type and {schedule} as it was trained" in said
    assert not target.exists()
    target.mkdir()
    (target / "photo.jpg").touch()
    assert "pass --overwrite" in refused(capsys, folder, base, "--output_dir", target)
    assert "is not replaced" in refused(capsys, folder, base, "--output_dir", target, "--overwrite")
    with pytest.raises(SystemExit):
        extract(folder, base)

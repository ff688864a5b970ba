"""`zsnr convert`, in the test's own process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import assert_same_weights, sd_scheduler, tiny_pipeline, write_file
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import enable_guidance_rescale, load_pipeline
from zsnr_diffusers.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an epsilon model without zero SNR."""
    folder = tmp_path_factory.mktemp("sd")
    tiny_pipeline("1").save_pretrained(folder)
    return folder


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def refused(capsys, *arguments):
    assert convert(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1].removeprefix("zsnr convert: error: ")


def test_there_and_back(folder, tmp_path, capsys):
    file, back = tmp_path / "model.safetensors", tmp_path / "back"
    options = ["--prediction_type", "v_prediction", "--zero_snr", "--guidance_rescale", 0.7]
    assert convert(folder, file, *options) == 0
    facts = "StableDiffusionPipeline, prediction_type=v_prediction, rescale_betas_zero_snr=True, guidance_rescale=0.7"
    assert capsys.readouterr().out == f"{file}: {facts}\n"
    assert {"v_pred", "ztsnr"} < load_file(file).keys()
    assert convert(file, back, "--config", folder) == 0
    assert capsys.readouterr().out == f"{back}: {facts}\n"
    pipe = load_pipeline(back)
    assert_same_weights(tiny_pipeline("1"), pipe)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.default_guidance_rescale == 0.7
    assert (back / "pipeline.py").exists()


def test_what_a_file_wrongly_says_can_be_taken_back(folder, tmp_path):
    file = write_file(tmp_path / "wrong.safetensors", "1", ["v_pred", "ztsnr"])
    right = tmp_path / "right.safetensors"
    options = ["--config", folder, "--prediction_type", "epsilon", "--no_zero_snr"]
    assert convert(file, right, *options) == 0
    assert not {"v_pred", "ztsnr"} & load_file(right).keys()


@pytest.mark.parametrize("target", ["half.safetensors", "half"])
def test_dtype_stays_unless_told(target, folder, tmp_path):
    half, again, told = tmp_path / target, tmp_path / "again.safetensors", tmp_path / "told.safetensors"
    config = ["--config", folder] if half.suffix else []
    assert convert(folder, half, "--dtype", "float16") == 0
    assert convert(half, again, *config) == 0
    assert {tensor.dtype for tensor in load_file(again).values()} == {torch.float16}
    assert convert(half, told, *config, "--dtype", "bfloat16") == 0
    assert {tensor.dtype for tensor in load_file(told).values()} == {torch.bfloat16}


def test_what_is_refused(folder, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    assert "no file" in refused(capsys, file, tmp_path / "new")
    write_file(file, "2")
    assert "does not say what it predicts" in refused(capsys, file, tmp_path / "new")
    assert "is there already" in refused(capsys, folder, file)
    assert "--config goes with a single file" in refused(capsys, folder, tmp_path / "new", "--config", folder)
    assert "guidance_rescale=7" in refused(capsys, folder, tmp_path / "new", "--guidance_rescale", 7)
    assert "cannot be used at zero" in refused(capsys, folder, tmp_path / "new", "--zero_snr")
    tiny_unconditional().save_pretrained(tmp_path / "pixels")
    arguments = [tmp_path / "pixels", tmp_path / "new", "--guidance_rescale", 0.7]
    assert "DDIMPipeline has no classifier-free guidance" in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()
    assert convert(folder, file, "--overwrite") == 0
    with pytest.raises(SystemExit):
        convert(folder, file, "--zero_snr", "--no_zero_snr")


def test_a_recorded_phi_can_be_dropped(folder, tmp_path):
    enable_guidance_rescale(tiny_pipeline("1", sd_scheduler("v_prediction")), 0.4).save_pretrained(tmp_path / "one")
    assert convert(tmp_path / "one", tmp_path / "two", "--guidance_rescale", 0) == 0
    assert "_guidance_rescale" not in json.loads((tmp_path / "two" / "model_index.json").read_text())
    assert not (tmp_path / "two" / "pipeline.py").exists()


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as caught:
        convert("--help")
    assert caught.value.code == 0
    assert "zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16" in capsys.readouterr().out

"""`zsnr convert`, in the test's own process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import PHI, adapted, assert_paints_alike
from tiny_checkpoints import assert_same_weights, checkpoint, sd_scheduler, tiny_pipeline, write_file
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import audit, enable_guidance_rescale, load_lora, load_pipeline, save_lora
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.ldm_format import UNET
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE


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


@pytest.mark.full
def test_there_and_back(folder, tmp_path, capsys):
    file, back = tmp_path / "model.safetensors", tmp_path / "back"
    options = ["--prediction_type", "v_prediction", "--zero_snr", "--guidance_rescale", 0.7]
    options += ["--keep_low_frequencies", 2]
    assert convert(folder, file, *options) == 0
    facts = "StableDiffusionPipeline, prediction_type=v_prediction, rescale_betas_zero_snr=True, guidance_rescale=0.7"
    facts += ", keep_low_frequencies=2"
    assert capsys.readouterr().out == f"{file}: {facts}\n"
    assert {"v_pred", "ztsnr"} < load_file(file).keys()
    assert convert(file, back, "--config", folder) == 0
    assert capsys.readouterr().out == f"{back}: {facts}\n"
    pipe = load_pipeline(back)
    assert_same_weights(tiny_pipeline("1"), pipe)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert (pipe.default_guidance_rescale, pipe.default_keep_low_frequencies) == (0.7, 2)
    assert (back / "pipeline.py").exists()


def test_what_a_file_wrongly_says_can_be_taken_back(folder, tmp_path):
    file = write_file(tmp_path / "wrong.safetensors", "1", ["v_pred", "ztsnr"])
    right = tmp_path / "right.safetensors"
    options = ["--config", folder, "--prediction_type", "epsilon", "--no_zero_snr"]
    assert convert(file, right, *options) == 0
    assert not {"v_pred", "ztsnr"} & load_file(right).keys()


@pytest.mark.full
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
    assert "No such file" in refused(capsys, file, tmp_path / "new")
    write_file(file, "2")
    assert "does not record its prediction type" in refused(capsys, file, tmp_path / "new")
    assert "already exists" in refused(capsys, folder, file)
    assert "--config requires a single file" in refused(capsys, folder, tmp_path / "new", "--config", folder)
    assert "--guidance_rescale 7.0 must lie in" in refused(capsys, folder, tmp_path / "new", "--guidance_rescale", 7)
    assert "cannot be used at zero" in refused(capsys, folder, tmp_path / "new", "--zero_snr")
    tiny_unconditional().save_pretrained(tmp_path / "pixels")
    arguments = [tmp_path / "pixels", tmp_path / "new", "--guidance_rescale", 0.7]
    assert "DDIMPipeline has no classifier-free guidance" in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()
    assert convert(folder, file, "--overwrite") == 0
    with pytest.raises(SystemExit):
        convert(folder, file, "--zero_snr", "--no_zero_snr")


@pytest.mark.full
def test_recorded_guidance_can_be_dropped(folder, tmp_path):
    pipe = enable_guidance_rescale(tiny_pipeline("1", sd_scheduler("v_prediction")), 0.4, keep_low_frequencies=2)
    pipe.save_pretrained(tmp_path / "one")
    none = ("--guidance_rescale", 0, "--keep_low_frequencies", 0)
    assert convert(tmp_path / "one", tmp_path / "two", *none) == 0
    index = json.loads((tmp_path / "two" / "model_index.json").read_text())
    assert not [name for name in index if name.startswith("_guidance")]
    assert not (tmp_path / "two" / "pipeline.py").exists()


# -- LoRA


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a LoRA in all networks; do not change it."""
    return save_lora(adapted("1", texts=True), tmp_path_factory.mktemp("lora") / "dark")


def assert_same_tensors(file, other, dtype=torch.float32):
    weights, others = load_file(file), load_file(other)
    assert weights.keys() == others.keys()
    assert {value.dtype for key, value in others.items() if not key.endswith("alpha")} == {dtype}
    assert all(torch.equal(value.to(others[key].dtype), others[key]) for key, value in weights.items())


@pytest.mark.full
@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(half, marks=pytest.mark.slow) for half in ("float16", "bfloat16"))]
)
def test_a_lora_there_and_back_is_the_same_bit_for_bit(dtype, lora, folder, tmp_path, capsys):
    file, back = tmp_path / "dark.safetensors", tmp_path / "back"
    assert convert(lora, file, "--config", folder, "--dtype", dtype) == 0
    facts = f"LoRA of {folder}, prediction_type=v_prediction, rescale_betas_zero_snr=True, guidance_rescale={PHI}"
    assert capsys.readouterr().out == f"{file}: {facts}\n"
    assert_same_tensors(lora / KOHYA_FILE, file, getattr(torch, dtype))
    assert convert(file, back, "--config", folder) == 0
    assert_same_tensors(lora / LORA_FILE, back / LORA_FILE, getattr(torch, dtype))
    assert audit(back).ok
    assert read_header(back / LORA_FILE).metadata["zsnr_diffusers"] == read_header(file).metadata["zsnr_diffusers"]
    if dtype == "float32":
        assert_paints_alike(load_lora(tiny_pipeline("1"), back), adapted("1", texts=True))


@pytest.mark.full
def test_a_lora_of_others_is_told_its_schedule(lora, folder, tmp_path, capsys):
    """With an alpha that is not its rank, as kohya's have it, which ends up in the weights."""
    weights = {
        key: value / 4 if key.endswith("alpha") else value for key, value in load_file(lora / KOHYA_FILE).items()
    }
    save_file(weights, tmp_path / "theirs.safetensors")
    arguments = [tmp_path / "theirs.safetensors", tmp_path / "ours", "--config", folder]
    assert "does not record its prediction type" in refused(capsys, *arguments)
    assert not (tmp_path / "ours").exists()
    assert convert(*arguments, "--prediction_type", "v_prediction", "--zero_snr", "--guidance_rescale", 0.3) == 0
    for key, value in load_file(tmp_path / "ours" / LORA_FILE).items():
        strength = 0.25 if "lora_B" in key else 1
        assert torch.equal(value, load_file(lora / LORA_FILE)[key] * strength)
    assert audit(tmp_path / "ours").ok
    assert load_lora(tiny_pipeline("1"), tmp_path / "ours").default_guidance_rescale == 0.3


@pytest.mark.full
def test_a_lora_of_xl_by_sd_scripts_has_the_names_of_the_original(tmp_path):
    """They train the original's UNet, whose blocks are numbered through."""
    tiny_pipeline("xl").save_pretrained(tmp_path / "base")
    attention = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    pipe = adapted("xl", target_modules=attention)
    ours = save_lora(pipe, tmp_path / "ours")
    original = {value.sum().item(): key.removeprefix(UNET) for key, value in checkpoint("xl").items() if UNET in key}
    layers = {
        key.removesuffix(".weight").replace(".", "_"): original[value.sum().item()].removesuffix(".weight")
        for key, value in tiny_pipeline("xl").unet.state_dict().items()
        if key.endswith(".weight")
    }
    theirs = {}
    for key, value in load_file(ours / KOHYA_FILE).items():
        layer, _, leaf = key.removeprefix("lora_unet_").partition(".")
        theirs[f"lora_unet_{layers[layer].replace('.', '_')}.{leaf}"] = value
    assert any(key.startswith("lora_unet_output_blocks_0_1_transformer_blocks_1_attn2") for key in theirs)
    said = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    save_file(theirs, tmp_path / "theirs.safetensors", said)
    assert convert(tmp_path / "theirs.safetensors", tmp_path / "back", "--config", tmp_path / "base") == 0
    assert_same_tensors(ours / LORA_FILE, tmp_path / "back" / LORA_FILE)
    assert audit(tmp_path / "back").ok


@pytest.mark.full
def test_of_the_base_configs_alone_are_read(lora, folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    assert convert(lora, tmp_path / "dark.safetensors", "--config", bare) == 0
    assert_same_tensors(lora / KOHYA_FILE, tmp_path / "dark.safetensors")


@pytest.mark.full
def test_what_is_refused_of_a_lora(lora, folder, tmp_path, capsys):
    target, config = tmp_path / "dark.safetensors", ("--config", folder)
    target.touch()
    assert "already exists" in refused(capsys, lora, target, *config)
    assert convert(lora, target, *config, "--overwrite") == 0
    assert_same_tensors(lora / KOHYA_FILE, target)
    capsys.readouterr()
    assert "without a pytorch_lora_weights.safetensors" in refused(capsys, lora, folder, *config, "--overwrite")
    assert "does not show which base it is for" in refused(capsys, lora, tmp_path / "new")
    assert "one of kohya_lora" in refused(capsys, lora, tmp_path / "new", *config, "--weight_name", "x.safetensors")
    dora = save_lora(adapted("1", use_dora=True), tmp_path / "dora")
    assert "cannot store a DoRA" in refused(capsys, dora, tmp_path / "new.safetensors", *config)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.safetensors").exists()
    assert convert(dora, tmp_path / "new", *config) == 0
    assert_same_tensors(dora / LORA_FILE, tmp_path / "new" / LORA_FILE)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize(("source", "base"), [("1", "xl"), ("xl", "1"), ("2", "xl")])
def test_a_lora_of_another_base_is_refused(source, base, tmp_path, capsys):
    tiny_pipeline(base).save_pretrained(tmp_path / "base")
    folder = save_lora(adapted(source, texts=True), tmp_path / "lora")
    for name in (LORA_FILE, KOHYA_FILE):
        said = refused(capsys, folder / name, tmp_path / "new", "--config", tmp_path / "base")
        assert name in said
        assert "it was trained on another base" in said or "size mismatch" in said
    assert not (tmp_path / "new").exists()


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as caught:
        convert("--help")
    assert caught.value.code == 0
    assert "zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16" in capsys.readouterr().out

"""Single files without a part, by other names, or with weights that are only numbers."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    EPSILON,
    KINDS,
    V,
    assert_same_weights,
    checkpoint,
    networks,
    says,
    tiny_pipeline,
    write_file,
)

from zsnr_diffusers import load_pipeline
from zsnr_diffusers.cli import main

PARTS = {
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
MARKED = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}


def distribute_all_like(kind):
    return [part for part in PARTS if part in networks(tiny_pipeline(kind))]


@pytest.fixture
def write(tmp_path):
    def write(weights):
        save_file({**weights, **MARKED}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@pytest.fixture
def bare(configs, tmp_path):
    """Configs without weights, as of an architecture."""

    def bare(kind):
        return shutil.copytree(configs[kind], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))

    return bare


def without(kind, *parts):
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    return {key: value for key, value in checkpoint(kind).items() if not key.startswith(prefixes)}


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if i else ()) for i, kind in enumerate(KINDS)]
)
def test_a_part_that_is_missing_is_taken_from_the_config_s_folder_or_as_it_is_given(kind, write, configs, bare):
    whole, folder = tiny_pipeline(kind), bare(kind)
    for missing in (*([part] for part in distribute_all_like(kind)), distribute_all_like(kind)):
        file = write(without(kind, *missing))
        given = {part: getattr(whole, part) for part in missing}
        pipe = load_pipeline(file, config=folder, **given)
        assert all(getattr(pipe, part) is given[part] for part in missing)
        for loaded in (pipe, load_pipeline(file, config=configs[kind])):
            assert says(loaded) == (V, True)
            assert_same_weights(whole, loaded)
        with pytest.raises(ValueError, match=r"model\.safetensors contains no .*: pass config=, a folder") as caught:
            load_pipeline(file, config=folder)
        assert all(f"{part}=" in str(caught.value) for part in missing)


def test_without_the_hub_too(write):
    with pytest.raises(
        ValueError, match=r"contains no autoencoder with .*vae=diffusers\.AutoencoderKL\.from_pretrained"
    ):
        load_pipeline(write(without("1", "vae")))


def test_old_names_of_the_text_encoder_are_not_taken_for_it(write, bare):
    """Of files from before transformers had its wrapper; diffusers finds no text encoder in them."""
    old = {key.replace("transformer.text_model.", "transformer."): value for key, value in checkpoint("1").items()}
    file, config = write(old), bare("1")
    with pytest.raises(ValueError, match=r"contains no text encoder with the names of Stable Diffusion 1\.x"):
        load_pipeline(file, config=config)
    pipe = load_pipeline(file, config=config, text_encoder=tiny_pipeline("1").text_encoder)
    assert_same_weights(tiny_pipeline("1"), pipe)


def test_position_ids_and_more_are_no_matter(write, configs):
    """Older files have the first; EMA stands beside the weights in others."""
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    ema = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones((), dtype=torch.int32)}
    schedule = {"alphas_cumprod": torch.linspace(1, 0, 1000), "model.betas": torch.linspace(0, 1, 1000)}
    pipe = load_pipeline(write({**checkpoint("1"), **ids, **ema, **schedule}), config=configs["1"])
    assert_same_weights(tiny_pipeline("1"), pipe)


UNET = "model.diffusion_model."


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        ("model_ema.diffusion_model", "only EMA weights, such as 'model_ema.diffusion_model"),
        ("diffusion_model.", "a UNet with unsupported names, such as 'diffusion_model."),
        ("", "a UNet with unsupported names, such as 'input_blocks."),
        ("unet.", "a UNet with unsupported names, such as 'unet."),
    ],
)
def test_unets_by_other_names_are_named(kind, prefix, what, write, configs):
    theirs = {key.replace(UNET, prefix, 1): value for key, value in checkpoint(kind).items() if key.startswith(UNET)}
    with pytest.raises(
        ValueError, match=r"is not a Stable Diffusion 1\.x, 2\.x or SDXL checkpoint with original names"
    ) as caught:
        load_pipeline(write(theirs), config=configs[kind])
    assert what in str(caught.value)
    save_file(tiny_pipeline(kind).unet.state_dict(), write({}))
    with pytest.raises(ValueError, match="a UNet with diffusers' names"):
        load_pipeline(write(tiny_pipeline(kind).unet.state_dict()), config=configs[kind])


# -- precision


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_weights_of_any_precision_become_float32_unless_told(dtype, write, configs):
    file = write({key: value.to(dtype) for key, value in without("xl", "vae").items()})
    pipe, half = (load_pipeline(file, config=configs["xl"], **more) for more in ({}, {"torch_dtype": torch.float16}))
    assert {part.dtype for part in networks(pipe).values()} == {torch.float32}
    assert half.unet.dtype == half.text_encoder_2.dtype == torch.float16
    expected = tiny_pipeline("xl").unet.conv_in.weight.to(dtype).float()
    assert torch.equal(pipe.unet.conv_in.weight, expected)


FIRST = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
SCALES = {
    **{"scaled_fp8": torch.zeros(2), FIRST.replace("weight", "scale_weight"): torch.ones(1)},
    **{f"{FIRST}{end}": torch.ones(2) for end in (".scale", "_scale", "_scale_inv", ".absmax", ".quant_map")},
    f"{FIRST}.quant_state.bitsandbytes__nf4": torch.ones(2),
    f"{FIRST.replace('weight', 'SCB')}": torch.ones(2),
    f"{FIRST.replace('weight', 'qzeros')}": torch.ones(2),
    f"{FIRST.replace('weight', 'comfy_quant')}": torch.ones(2),
}


@pytest.mark.parametrize("key", SCALES)
def test_weights_with_scales_beside_them_are_refused_in_files_and_folders(key, write, configs, tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors holds quantized weights") as caught:
        load_pipeline(write({**checkpoint("1"), key: SCALES[key]}), config=configs["1"])
    assert repr(key) in str(caught.value)
    folder = shutil.copytree(configs["1"], tmp_path / "folder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights, name = load_file(file), key.removeprefix(UNET)
    save_file({**weights, name: SCALES[key]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.safetensors holds quantized weights"):
        load_pipeline(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_whole_numbers_are_no_weights(dtype, write, configs):
    weights = dict(checkpoint("1"))
    weights[FIRST] = torch.zeros_like(weights[FIRST], dtype=dtype)
    with pytest.raises(ValueError, match="which is not a floating-point dtype"):
        load_pipeline(write(weights), config=configs["1"])


# -- what a file does not say


@pytest.mark.full
@pytest.mark.parametrize("kind", ["1", "xl"])
def test_a_guess_is_said_and_not_written(kind, configs, tmp_path, said, capsys):
    file, target = write_file(tmp_path / "model.safetensors", kind), tmp_path / "new.safetensors"
    assert says(load_pipeline(file, config=configs[kind])) == (EPSILON, False)
    assert [
        line for line in said("WARNING") if "does not record its prediction type; it is assumed to be epsilon" in line
    ]
    command = ["convert", str(file), str(target), "--config", str(configs[kind])]
    assert main(command) == 2
    assert "--prediction_type epsilon (most SD 1.x" in capsys.readouterr().err
    assert not target.exists()
    assert main([*command, "--prediction_type", "epsilon"]) == 0
    assert main(["convert", str(target), str(tmp_path / "again"), "--config", str(configs[kind])]) == 0


@pytest.mark.full
def test_an_original_config_says_it_for_a_pipeline(configs, tmp_path, said):
    file, config = write_file(tmp_path / "model.safetensors", "2"), tmp_path / "v2-inference-v.yaml"
    config.write_text("model:\n  params:\n    parameterization: v\n")
    assert says(load_pipeline(file, config=configs["2"], original_config=config)) == (V, False)
    config.rename(tmp_path / "model.yaml")
    assert says(load_pipeline(file, config=configs["2"])) == (V, False)
    assert main(["convert", str(file), str(tmp_path / "new"), "--config", str(configs["2"])]) == 0
    assert says(load_pipeline(tmp_path / "new")) == (V, False)


@pytest.mark.full
def test_the_command_takes_an_autoencoder(write, configs, bare, tmp_path, capsys):
    file, target = write(without("xl", "vae")), tmp_path / "new.safetensors"
    command = ["convert", str(file), str(target), "--config", str(bare("xl"))]
    assert main(command) == 2
    assert "contains no autoencoder with the names of Stable Diffusion XL: pass --config, a" in capsys.readouterr().err
    AutoencoderKL.from_pretrained(configs["xl"], subfolder="vae").save_pretrained(tmp_path / "vae")
    prefix, by_itself = "first_stage_model.", tmp_path / "sdxl_vae.safetensors"
    save_file({k.removeprefix(prefix): v for k, v in checkpoint("xl").items() if k.startswith(prefix)}, by_itself)
    of_diffusers = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    for vae in (configs["xl"], tmp_path / "vae", by_itself, of_diffusers):
        assert main([*command, "--vae", str(vae), "--overwrite"]) == 0
        back = load_file(target)
        assert all(torch.equal(back[key], value) for key, value in checkpoint("xl").items())
    assert main([*command, "--vae", str(by_itself), "--dtype", "float16", "--overwrite"]) == 0
    assert {value.dtype for value in load_file(target).values() if value.numel()} == {torch.float16}  # but for marks
    assert main([*command, "--vae", str(file), "--overwrite"]) == 2
    assert f"vae: {file} contains no Stable Diffusion autoencoder" in capsys.readouterr().err


# -- names of targets


@pytest.mark.parametrize("end", [".ckpt", ".pt", ".pth", ".bin", ".gguf", ".st", ".CKPT"])
def test_a_folder_never_gets_the_name_of_a_file(end, configs, tmp_path, capsys):
    assert main(["convert", str(configs["1"]), str(tmp_path / f"run1{end}")]) == 2
    assert "use run1.safetensors" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]

"""LoRA files with their schedule, out of a pipeline and into one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, EulerDiscreteScheduler
from hub_server import serve
from safetensors.torch import load_file, save_file
from tiny_adapters import PHI, adapted, add_adapter, assert_paints_alike, needs_text_adapters
from tiny_checkpoints import generate, sd_scheduler, tiny_pipeline
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    enable_guidance_rescale,
    load_lora,
    save_lora,
)
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE
from zsnr_diffusers.hub.saved_model import SavedModel
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a LoRA, and its pipeline; do not change them."""
    pipe = adapted()
    return save_lora(pipe, tmp_path_factory.mktemp("lora") / "name"), pipe


@pytest.fixture
def said(caplog):
    """What the loader says, by level."""
    caplog.set_level("INFO", logger="zsnr_diffusers")

    def lines(level):
        ours = [record for record in caplog.records if record.name.startswith("zsnr_diffusers")]
        return [record.getMessage() for record in ours if record.levelname == level]

    return lines


STOCK_ALONE = """
import sys
sys.modules["zsnr_diffusers"] = None  # importing it raises, as if it were not installed
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
images = {}
for kind in ("1", "xl"):
    pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/base {kind}")
    for name, file in (("lora", None), ("dora", None), ("lora", "kohya_lora_weights.safetensors")):
        folder = f"{sys.argv[1]}/{name} {kind}"
        pipe.load_lora_weights(folder, **({"weight_name": file} if file else {}))
        pipe.scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        call = dict(num_inference_steps=3, height=64, width=64, guidance_scale=4.0, output_type="latent")
        image = pipe("a dark landscape", generator=torch.Generator().manual_seed(0), **call).images
        images[kind, name, file] = image
        pipe.unload_lora_weights()
torch.save(images, f"{sys.argv[1]}/images.pt")
"""


@pytest.mark.full
def test_stock_alone_opens_it_and_paints_our_pictures(tmp_path):
    """LoRA, DoRA, and kohya's file."""
    pipes = {}
    for kind in ("1", "xl"):
        tiny_pipeline(kind).save_pretrained(tmp_path / f"base {kind}")
        for name in ("lora", "dora"):
            pipes[kind, name] = adapted(kind, use_dora=name == "dora")
            save_lora(pipes[kind, name], tmp_path / f"{name} {kind}")
        assert not (tmp_path / f"dora {kind}" / KOHYA_FILE).exists()
    online = {**os.environ, "HF_HUB_OFFLINE": "0"}  # older diffusers want the file's name when offline
    result = subprocess.run([sys.executable, "-c", STOCK_ALONE, tmp_path], env=online, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "are not expected" not in result.stderr
    assert "unexpected keys" not in result.stderr
    for (kind, name, _), image in torch.load(tmp_path / "images.pt").items():
        pipe = pipes[kind, name]
        ours = generate(pipe, guidance_rescale=0.0)
        # stock stands in for SNR 0 with 2^-24, so 2^-12 of the amplitude
        torch.testing.assert_close(ours, image, rtol=0, atol=1e-3 * ours.abs().max().item())
    assert (
        generate(tiny_pipeline("1", pipes["1", "lora"].scheduler)) - generate(pipes["1", "lora"])
    ).abs().max() > 0.1


@pytest.mark.full
def test_one_line_loads_weights_schedule_and_guidance_rescale(saved, said):
    folder, pipe = saved
    for source in (str(folder), folder / LORA_FILE, folder / KOHYA_FILE):
        base = tiny_pipeline("1")
        assert load_lora(base, source) is base
        assert type(base.scheduler) is ZeroSNRDDIMScheduler
        for fact in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr"):
            assert base.scheduler.config[fact] == pipe.scheduler.config[fact]
        assert base.scheduler.config.timestep_spacing == "trailing"
        assert base.default_guidance_rescale == PHI
        assert_paints_alike(base, pipe)
    assert not said("WARNING")
    assert said("INFO")[0].endswith(
        "prediction_type='v_prediction' by metadata zsnr_diffusers, rescale_betas_zero_snr=True by metadata "
        "zsnr_diffusers; sampled by ZeroSNRDDIMScheduler, guidance rescale 0.6."
    )


@pytest.mark.full
def test_from_the_hub(saved, tmp_path):
    """The Hub's place is taken by a server on this machine; what talks to it is the real client."""
    tiny_pipeline("1").save_pretrained(tmp_path / "base")
    script = (
        "import sys; from diffusers import DiffusionPipeline; from zsnr_diffusers import load_lora\n"
        "pipe = load_lora(DiffusionPipeline.from_pretrained(sys.argv[1]), 'acme/lora', revision='main')\n"
        "print(type(pipe.scheduler).__name__, pipe.default_guidance_rescale, pipe.get_list_adapters())\n"
        "try: load_lora(pipe, 'acme/lora', weight_name='x.safetensors')\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    with serve({"acme/lora": saved[0]}) as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", script, tmp_path / "base"]
        result = subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "ZeroSNRDDIMScheduler 0.6 {'unet': ['default_0']}",
        "acme/lora is not a local folder or file, and cannot be read from the Hub: it has no file x.safetensors. Pass "
        "weight_name=.",
    ]


def test_a_scheduler_that_is_right_stays_and_arguments_win(saved):
    base = tiny_pipeline("1")
    facts = {"prediction_type": "v_prediction"}
    right = ZeroSNRMultistepScheduler.from_config(base.scheduler.config, timestep_spacing="kappa", **facts)
    base.scheduler = right
    load_lora(base, saved[0], guidance_rescale=0.2, adapter_name="mine")
    assert base.scheduler is right
    assert base.default_guidance_rescale == 0.2
    assert base.get_list_adapters() == {"unet": ["mine"]}


@pytest.mark.full
def test_without_zero_snr_the_pipeline_s_own_sampler_stays(tmp_path):
    pipe = adapted()
    pipe.scheduler = sd_scheduler("v_prediction")
    pipe.default_guidance_rescale = 0.0
    save_lora(pipe, tmp_path)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for predicts in ("v_prediction", "epsilon"):
        scheduler = EulerDiscreteScheduler(**betas, prediction_type=predicts)
        base = load_lora(tiny_pipeline("1", scheduler), tmp_path)
        assert (base.scheduler is scheduler) == (predicts == "v_prediction")
        assert type(base.scheduler) is EulerDiscreteScheduler
        assert base.scheduler.config.prediction_type == "v_prediction"
        assert base.scheduler.config.rescale_betas_zero_snr is False
        assert not hasattr(base, "default_guidance_rescale")


@pytest.mark.full
def test_the_low_frequencies_to_keep_stand_in_the_file(tmp_path, said):
    pipe = adapted()
    pipe.default_keep_low_frequencies = 3
    save_lora(pipe, tmp_path / "lora.safetensors")
    base = load_lora(tiny_pipeline("1"), tmp_path / "lora.safetensors")
    assert (base.default_guidance_rescale, base.default_keep_low_frequencies) == (PHI, 3)
    assert said("INFO")[0].endswith("guidance rescale 0.6, lowest 3 x 3 frequencies kept.")
    other = load_lora(tiny_pipeline("1"), tmp_path / "lora.safetensors", keep_low_frequencies=0)
    assert (other.default_guidance_rescale, other.default_keep_low_frequencies) == (PHI, 0)


def rewritten(saved, path, metadata):
    save_file(load_file(saved[0] / LORA_FILE), path, metadata)
    return path


@pytest.mark.full
@pytest.mark.parametrize(
    ("metadata", "zero"),
    [
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, True),
        ({"ss_v_parameterization": "true"}, False),
        ({"ss_base_model_version": "sd_v2_v", "ss_zero_terminal_snr": "True"}, True),
        ({"modelspec.prediction_type": "v"}, False),
    ],
)
def test_files_of_others_say_it_in_their_own_way(saved, tmp_path, metadata, zero):
    base = tiny_pipeline("1")
    load_lora(base, rewritten(saved, tmp_path / "theirs.safetensors", metadata))
    assert base.scheduler.config.prediction_type == "v_prediction"
    assert base.scheduler.config.rescale_betas_zero_snr == zero


def test_a_file_that_says_nothing_is_refused_and_arguments_help(saved, tmp_path):
    file = rewritten(saved, tmp_path / "silent.safetensors", None)
    base = tiny_pipeline("1")
    with pytest.raises(ValueError, match=r"silent.safetensors does not record .* pass prediction_type= and resc"):
        load_lora(base, file)
    assert base.get_list_adapters() == {}
    load_lora(base, file, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert_paints_alike(enable_guidance_rescale(base, PHI), saved[1])


def test_what_the_metadata_says(saved):
    folder, pipe = saved
    for name in (LORA_FILE, KOHYA_FILE):
        metadata = read_header(folder / name).metadata
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert metadata["modelspec.title"] == "name"
        assert metadata["ss_v_parameterization"] == metadata["ss_zero_terminal_snr"] == "True"
        assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v1_v", "False")
        opened = SavedModel.open(folder / name)
        assert (opened.prediction_type, opened.rescale_betas_zero_snr) == ("v_prediction", True)
        assert opened.guidance["guidance_rescale"] == PHI
        assert opened.schedule["beta_end"] == pipe.scheduler.config["beta_end"]
        assert not opened.conflicts
    assert '"timestep_spacing": "trailing"' in metadata["zsnr_diffusers"]


def test_kohya_s_file_has_every_layer(tmp_path):
    pipe = adapted(target_modules=LORA_TARGETS)
    weights, theirs = (load_file(save_lora(pipe, tmp_path) / name) for name in (LORA_FILE, KOHYA_FILE))
    layers = {name.removeprefix("unet.").rpartition(".lora_")[0] for name in weights}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert {"conv_in", "conv_out"} < layers
    assert theirs.keys() == {f"lora_unet_{layer.replace('.', '_')}.{part}" for layer in layers for part in parts}
    assert {int(theirs[key]) for key in theirs if key.endswith("alpha")} == {3}


@pytest.mark.full
def test_conflicts_are_said_and_the_impossible_is_refused(saved, tmp_path, said):
    told = {**read_header(saved[0] / LORA_FILE).metadata, "modelspec.prediction_type": "epsilon"}
    load_lora(tiny_pipeline("1"), rewritten(saved, tmp_path / "torn.safetensors", told))
    assert "prediction_type is 'v_prediction' according to metadata zsnr_diffusers" in said("WARNING")[0]
    with pytest.raises(ValueError, match="cannot be used at zero signal-to-noise"):
        load_lora(tiny_pipeline("1"), saved[0], prediction_type="epsilon")
    with pytest.raises(ValueError, match="guidance_rescale=2"):
        load_lora(tiny_pipeline("1"), saved[0], guidance_rescale=2.0)


@pytest.mark.full
@needs_text_adapters
@pytest.mark.parametrize("kind", ["1", pytest.param("2", marks=pytest.mark.slow), "xl"])
def test_adapters_of_text_encoders_go_with_it(kind, tmp_path):
    """By the names that are in use, whatever newer versions of transformers call the layers."""
    pipe = adapted(kind, texts=True)
    folder = save_lora(pipe, tmp_path)
    theirs = {"1": ["lora_te_"], "2": ["lora_te_"], "xl": ["lora_te1_", "lora_te2_"]}[kind]
    encoders = ["text_encoder.", "text_encoder_2."][: len(theirs)]
    for name, prefixes in ((LORA_FILE, encoders), (KOHYA_FILE, theirs)):
        keys = read_header(folder / name).shapes
        layer = "text_model.encoder.layers.0.self_attn.q_proj"
        for prefix in prefixes:
            assert any(
                key.startswith(prefix + (layer.replace(".", "_") if "." not in prefix else layer)) for key in keys
            )
        others = [key for key in keys if not key.startswith((*prefixes, "unet.", "lora_unet_"))]
        assert others == []
        base = load_lora(tiny_pipeline(kind), folder / name)
        assert base.get_list_adapters().keys() == pipe.get_list_adapters().keys()
        assert_paints_alike(base, pipe)
    unet_alone = load_lora(tiny_pipeline(kind), save_lora(adapted(kind), tmp_path / "unet"))
    assert (generate(unet_alone) - generate(pipe)).abs().max() > 0.01


@pytest.mark.full
def test_a_file_of_kohya_s_names_alone(tmp_path):
    pipe = adapted()
    file = save_lora(pipe, tmp_path / "there" / "dark.safetensors")
    assert [path.name for path in file.parent.iterdir()] == ["dark.safetensors"]
    assert read_header(file).metadata["modelspec.title"] == "dark"
    assert_paints_alike(load_lora(tiny_pipeline("1"), file), pipe)
    with pytest.raises(ValueError, match="cannot store a DoRA; save it to a folder"):
        save_lora(adapted(use_dora=True), tmp_path / "dora.safetensors")
    assert not (tmp_path / "dora.safetensors").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("strength", "trained_in", "dtype"),
    [
        (0.5, torch.float16, torch.float16),
        (2.0**-12, torch.float16, torch.float32),
        (1 / 3, torch.float64, torch.float64),
    ],
)
def test_a_strength_that_half_precision_would_round_makes_float32(strength, trained_in, dtype, tmp_path):
    """Below 2^-14 float16 has fewer bits; of float64, none are lost."""
    pipe = adapted(lora_alpha=3 * strength)
    for key, value in pipe.unet.named_parameters():
        if "lora_" in key:
            value.data = (value.data + 0.05 * value.data.sign()).to(trained_in)
    weights = load_file(save_lora(pipe, tmp_path) / LORA_FILE)
    trained = dict(pipe.unet.named_parameters())
    ups = {key.removeprefix("unet."): value for key, value in weights.items() if "lora_B" in key}
    assert {value.dtype for value in ups.values()} == {dtype}
    for key, value in ups.items():
        assert torch.equal(value.double(), trained[key.replace("lora_B", "lora_B.default")].double() * strength)


@pytest.mark.full
def test_a_strength_that_was_set_is_saved(tmp_path):
    pipe = adapted()
    pipe.set_adapters("default", 0.5)
    base = load_lora(tiny_pipeline("1"), save_lora(pipe, tmp_path))
    assert_paints_alike(base, pipe)
    pipe.set_adapters("default", 1.0)
    assert (generate(base) - generate(pipe)).abs().max() > 0.01


def test_what_is_loaded_can_be_saved_again(saved, tmp_path):
    again = save_lora(load_lora(tiny_pipeline("1"), saved[0]), tmp_path)
    weights, others = (load_file(Path(folder, LORA_FILE)) for folder in (saved[0], again))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_what_is_no_single_adapter_of_a_unet_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one adapter, in the UNet and .*; StableDiffusionPipeline has none"):
        save_lora(tiny_pipeline("1"), tmp_path)
    pipe = adapted()
    with pytest.warns(UserWarning, match="multiple adapters"):
        add_adapter(pipe.unet, "second")
    with pytest.raises(ValueError, match="has unet: default, second"):
        save_lora(pipe, tmp_path)
    with pytest.raises(ValueError, match="has none"):
        save_lora(tiny_unconditional(), tmp_path)
    assert not list(tmp_path.iterdir())


@needs_text_adapters
def test_an_adapter_of_the_text_encoder_alone_is_refused(tmp_path):
    pipe = tiny_pipeline("1")
    add_adapter(pipe.text_encoder, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="text_encoder: default"):
        save_lora(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_files_and_other_pipelines(saved, tmp_path):
    base = tiny_pipeline("1")
    with pytest.raises(
        FileNotFoundError, match=rf"No such file: .*other.safetensors; pass weight_name=, one of {KOHYA_FILE}, "
    ):
        load_lora(base, saved[0], weight_name="other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No such file: .*nowhere.safetensors"):
        load_lora(base, tmp_path / "nowhere.safetensors")
    with pytest.raises(OSError, match="acme/lora is not a local folder or file, and cannot be read from the Hub"):
        load_lora(base, "acme/lora")
    with pytest.raises(TypeError, match="DDPMPipeline has no load_lora_weights"):
        load_lora(DDPMPipeline(tiny_unconditional().unet, sd_scheduler()), saved[0])


def test_without_peft_it_says_what_to_install(saved, monkeypatch):
    base = tiny_pipeline("1")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft is needed .* pip install 'zsnr_diffusers\[lora\]'"):
        load_lora(base, saved[0])

"""Single files: what is made of one, and what is written."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, StableDiffusionInpaintPipeline
from published_models import in_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_pipelines.parts import unet
from tiny_checkpoints import (
    EPSILON,
    KINDS,
    V,
    assert_same_weights,
    checkpoint,
    generate,
    says,
    sd_scheduler,
    tiny_pipeline,
    write_file,
)
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    enable_guidance_rescale,
    load_pipeline,
    save_pipeline,
)
from zsnr_diffusers.hub.saved_model import SavedModel


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_say_nothing_are_what_their_config_says_or_the_caller(kind, configs, tmp_path):
    file = write_file(tmp_path / "model.safetensors", kind)
    assert says(load_pipeline(file, config=configs[kind])) == (EPSILON, False)
    told = load_pipeline(file, config=str(configs[kind]), prediction_type=V, rescale_betas_zero_snr=True)
    assert says(told) == (V, True)
    assert type(told.scheduler) is ZeroSNRDDIMScheduler


def test_without_a_config_a_file_of_2_has_to_say_what_it_predicts(tmp_path):
    """Of the same names and shapes there are models of both kinds."""
    file = write_file(tmp_path / "model.safetensors", "2")
    with pytest.raises(
        ValueError, match=r"does not record its prediction type.*prediction_type='v_prediction' \(2\.0"
    ):
        load_pipeline(file)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_config_and_without_the_hub(kind, tmp_path):
    file = write_file(tmp_path / "model.safetensors", kind, ["v_pred"])
    with pytest.raises(OSError, match=r"Pass config=, a folder or Hub id of a Stable Diffusion (1\.x|2\.x|XL) pipel"):
        load_pipeline(file)
    with pytest.raises(OSError, match="nowhere"):
        load_pipeline(file, config=str(tmp_path / "nowhere"))


def test_conflicts_are_named_with_what_counts(configs, tmp_path, said):
    keys, spec = ["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}
    file = write_file(tmp_path / "model.safetensors", "1", keys, spec)
    assert says(load_pipeline(file, config=configs["1"])) == (V, True)
    lines = [line.removeprefix(f"{file}: ") for line in said("WARNING")]
    counts = "prediction_type is 'v_prediction' according to key v_pred and key ztsnr, which is used, and 'epsilon' "
    assert lines == [
        f"{counts}according to modelspec metadata. Pass prediction_type= to decide.",
        f"{counts}according to the scheduler's config. Pass prediction_type= to decide.",
        "rescale_betas_zero_snr is True according to key v_pred and key ztsnr, which is used, and False according to "
        "the scheduler's config. Pass rescale_betas_zero_snr= to decide.",
    ]
    decided = load_pipeline(file, config=configs["1"], prediction_type=EPSILON, rescale_betas_zero_snr=False)
    assert says(decided) == (EPSILON, False)
    assert len(said("WARNING")) == 3  # no more than before


def test_zero_snr_of_an_epsilon_model_is_refused(configs, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["ztsnr"])
    for options in ({}, {"prediction_type": EPSILON}):
        with pytest.raises(
            ValueError, match=r"model.safetensors: .*if it is a v-prediction model with a wrong config"
        ):
            load_pipeline(file, config=configs["1"], **options)
    assert says(load_pipeline(file, config=configs["1"], rescale_betas_zero_snr=False)) == (EPSILON, False)
    with pytest.raises(ValueError, match=r"cannot be used at zero signal-to-noise ratio"):
        load_pipeline(configs["1"], rescale_betas_zero_snr=True)


def test_files_of_other_models_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    no_text = {key: tensor for key, tensor in checkpoint("xl").items() if not key.startswith("conditioner")}
    depth = dict(checkpoint("1"))
    depth["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(8, 5, 3, 3)
    for weights in ({"weight": torch.ones(1)}, depth):
        save_file(weights, file)
        with pytest.raises(
            ValueError, match=r"is not a Stable Diffusion 1\.x, 2\.x or SDXL checkpoint with original names"
        ):
            load_pipeline(file)
    save_file(no_text, file)
    with pytest.raises(
        ValueError, match="contains no text encoder and no second text encoder with the names of Stable"
    ):
        load_pipeline(file)


def test_inpainting_models_get_their_class(configs, tmp_path):
    pipe = tiny_pipeline("1")
    inpaint = StableDiffusionInpaintPipeline(
        **{**pipe.components, "unet": unet(in_channels=9)}, requires_safety_checker=False
    )
    inpaint.save_pretrained(tmp_path / "config")
    save_pipeline(inpaint, tmp_path / "model.safetensors")
    back = load_pipeline(tmp_path / "model.safetensors", config=tmp_path / "config")
    assert type(back) is StableDiffusionInpaintPipeline
    assert_same_weights(inpaint, back)


# -- saving


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scheduler",
    [sd_scheduler(), sd_scheduler(V), ZeroSNRMultistepScheduler.from_config(sd_scheduler(V).config)],
    ids=["epsilon", "v", "zero SNR"],
)
def test_single_files_round_trip(kind, scheduler, configs, tmp_path):
    pipe, zero_snr = tiny_pipeline(kind, scheduler), scheduler.config["rescale_betas_zero_snr"]
    if zero_snr:
        enable_guidance_rescale(pipe, 0.4, space="v", keep_low_frequencies=2)
    file = save_pipeline(pipe, tmp_path / "one" / "model.safetensors")
    back = load_pipeline(file, config=configs[kind])
    assert_same_weights(pipe, back)
    assert says(back) == (scheduler.config["prediction_type"], zero_snr)
    assert getattr(back, "default_guidance_rescale", 0.0) == (0.4 if zero_snr else 0.0)
    assert getattr(back, "default_keep_low_frequencies", 0) == (2 if zero_snr else 0)
    if zero_snr:
        assert back.guidance_space == "v"
        back.scheduler = scheduler  # the sampler is not the model's
    assert torch.equal(generate(in_memory(back)), generate(pipe))
    again = save_pipeline(back, tmp_path / "two" / "model.safetensors")
    assert content(again) == content(file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.safetensors"] * 2 + ["one", "two"]


def content(file):
    """Header and weights; the library writes metadata in any order."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheduler", "marks", "prediction_type"),
    [
        (sd_scheduler(), [], "epsilon"),
        (sd_scheduler(V), ["v_pred"], "v"),
        (sd_scheduler(V, zero_snr=True), ["v_pred", "ztsnr"], "v"),
    ],
)
def test_others_find_the_marks(scheduler, marks, prediction_type, tmp_path):
    """Without our own record too."""
    file = save_pipeline(tiny_pipeline("2", scheduler), tmp_path / "night.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert sorted(tensors.keys() - checkpoint("2").keys()) == marks
    assert all(tensors[key].shape == (0,) for key in marks)
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert spec == {
        "sai_model_spec": "1.0.0",
        "architecture": f"stable-diffusion-v2-{'768-v' if marks else '512'}",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "night",
        "resolution": "64x64",
        "prediction_type": prediction_type,
    }
    metadata.pop("zsnr_diffusers")
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    saved = SavedModel.open(tmp_path / "other.safetensors")
    assert saved.prediction_type == scheduler.config.prediction_type
    assert bool(saved.rescale_betas_zero_snr) == scheduler.config.rescale_betas_zero_snr
    assert saved.conflicts == []


@pytest.mark.full
def test_other_betas_travel_with_the_file_and_are_said(configs, tmp_path, said):
    pipe = tiny_pipeline("1", ZeroSNRDDIMScheduler(prediction_type=V, beta_end=0.03, num_train_timesteps=500))
    file = save_pipeline(pipe, tmp_path / "model.safetensors")
    (line,) = said("WARNING")
    assert "num_train_timesteps=500, beta_start=0.0001, beta_end=0.03, beta_schedule='linear'" in line
    back = load_pipeline(file, config=configs["1"]).scheduler
    assert torch.equal(back.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    stock = load_pipeline(file, config=configs["1"], rescale_betas_zero_snr=False).scheduler
    assert type(stock) is DDIMScheduler
    assert (stock.config.beta_end, len(stock.alphas_cumprod)) == (0.03, 500)


def test_half_precision_stays_half(configs, tmp_path):
    file = save_pipeline(tiny_pipeline("xl").to(torch.float16), tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (sd_scheduler("sample"), "predict epsilon or v_prediction, not prediction_type='sample'"),
        (sd_scheduler(EPSILON, zero_snr=True), "cannot be used at zero signal-to-noise ratio"),
        (EDMEulerScheduler(), "not prediction_type=None"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(scheduler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_pipeline(tiny_pipeline("1", scheduler), tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_a_single_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DDIMPipeline \(unet: UNet2DModel\) cannot be saved as a single file"):
        save_pipeline(tiny_unconditional(), tmp_path / "model.safetensors")

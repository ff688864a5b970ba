"""Pipelines out of folders and single files, and into them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from hub_server import serve
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_pipelines.parts import unet
from test_class_conditional import build as class_conditional
from tiny_checkpoints import (
    KINDS,
    assert_same_weights,
    checkpoint,
    paint,
    sd_scheduler,
    tiny_pipeline,
    write_file,
)
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRMultistepScheduler,
    disable_guidance_rescale,
    enable_guidance_rescale,
    load_pipeline,
    save_pipeline,
)
from zsnr_diffusers.model_facts import find_model_facts

V, EPSILON = "v_prediction", "epsilon"
CLASSES = {"1": StableDiffusionPipeline, "2": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    """Folders of `tiny_pipeline` by kind, as published for the architecture: epsilon, no zero SNR."""
    folders = {kind: tmp_path_factory.mktemp(f"sd-{kind}") for kind in KINDS}
    for kind, folder in folders.items():
        tiny_pipeline(kind).save_pretrained(folder)
    return folders


@pytest.fixture
def config_of(configs, tmp_path):
    """The same folder with another scheduler."""

    def config(kind, scheduler):
        for entry in configs[kind].iterdir():
            if entry.name not in ("scheduler", "model_index.json"):
                os.symlink(entry, tmp_path / entry.name)
        index = json.loads((configs[kind] / "model_index.json").read_text())
        index["scheduler"] = [type(scheduler).__module__.split(".schedulers")[0], type(scheduler).__name__]
        if type(scheduler).__module__.startswith("zsnr"):
            index["scheduler"][0] = "zsnr_diffusers.schedulers"
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        scheduler.save_pretrained(tmp_path / "scheduler")
        return tmp_path

    return config


@pytest.fixture
def said(caplog):
    """What the loaders say, by level."""
    caplog.set_level("INFO", logger="zsnr_diffusers")

    def lines(level):
        return [record.getMessage() for record in caplog.records if record.levelname == level]

    return lines


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def says(pipe):
    return pipe.scheduler.config["prediction_type"], pipe.scheduler.config["rescale_betas_zero_snr"]


# -- loading


def marked(path, kind, prediction_type, zero_snr, where):
    """A file that says so, and the scheduler that its config has."""
    keys, metadata, scheduler = [], {}, sd_scheduler()
    if where == "keys":
        keys = ["v_pred"] * (prediction_type == V) + ["ztsnr"] * zero_snr
    elif where == "modelspec":
        metadata = {"modelspec.prediction_type": "v" if prediction_type == V else "epsilon"}
        keys = ["ztsnr"] * zero_snr
    elif where == "config":
        scheduler = sd_scheduler(prediction_type, zero_snr)
    return write_file(path, kind, keys, metadata), scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prediction_type", "zero_snr"), [(EPSILON, False), (V, False), (V, True)])
@pytest.mark.parametrize("where", ["keys", "modelspec", "config"])
def test_single_files(kind, prediction_type, zero_snr, where, config_of, tmp_path, said):
    (tmp_path / "file").mkdir()
    file, scheduler = marked(tmp_path / "file" / "model.safetensors", kind, prediction_type, zero_snr, where)
    folder = config_of(kind, scheduler)
    pipe = load_pipeline(file, config=folder)
    assert type(pipe) is CLASSES[kind]
    assert says(pipe) == (prediction_type, zero_snr)
    kept = where == "config" or not zero_snr
    assert type(pipe.scheduler) is (DDIMScheduler if kept else ZeroSNRDDIMScheduler)
    assert pipe.scheduler.config.timestep_spacing == ("trailing" if zero_snr else "leading")
    assert len(said("INFO")) == 1
    assert f"model.safetensors: prediction_type='{prediction_type}' by " in said("INFO")[0]
    assert (said("WARNING") != []) == (prediction_type == V and where != "config")
    assert torch.equal(paint(pipe), painted(kind, prediction_type, zero_snr, kept))


@functools.cache
def painted(kind, prediction_type, zero_snr, kept):
    scheduler = sd_scheduler(prediction_type, zero_snr)
    return paint(tiny_pipeline(kind, scheduler if kept else ZeroSNRDDIMScheduler.from_config(scheduler.config)))


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
    with pytest.raises(ValueError, match=r"does not say what it predicts.*prediction_type='v_prediction' \(2\.0"):
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
    counts = "prediction_type is 'v_prediction' by key v_pred and key ztsnr, which counts, and 'epsilon' by "
    assert lines == [
        f"{counts}modelspec metadata. Pass prediction_type= to decide.",
        f"{counts}the scheduler's config. Pass prediction_type= to decide.",
        "rescale_betas_zero_snr is True by key v_pred and key ztsnr, which counts, and False by the scheduler's "
        "config. Pass rescale_betas_zero_snr= to decide.",
    ]
    decided = load_pipeline(file, config=configs["1"], prediction_type=EPSILON, rescale_betas_zero_snr=False)
    assert says(decided) == (EPSILON, False)
    assert len(said("WARNING")) == 3  # no more than before


def test_zero_snr_of_an_epsilon_model_is_refused(configs, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["ztsnr"])
    for options in ({}, {"prediction_type": EPSILON}):
        with pytest.raises(ValueError, match=r"model.safetensors: .*if it is a v-prediction model whose config fails"):
            load_pipeline(file, config=configs["1"], **options)
    assert says(load_pipeline(file, config=configs["1"], rescale_betas_zero_snr=False)) == (EPSILON, False)
    with pytest.raises(ValueError, match=r"cannot be used at zero signal-to-noise ratio"):
        load_pipeline(configs["1"], rescale_betas_zero_snr=True)


def test_files_of_other_models_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    no_text = {key: tensor for key, tensor in checkpoint("xl").items() if not key.startswith("conditioner")}
    depth = dict(checkpoint("1"))
    depth["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(8, 5, 3, 3)
    for weights in ({"weight": torch.ones(1)}, no_text, depth):
        save_file(weights, file)
        with pytest.raises(ValueError, match=r"is no Stable Diffusion 1\.x, 2\.x or XL with its text encoders"):
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


# Folders


@pytest.mark.parametrize(
    "scheduler",
    [
        sd_scheduler(),
        sd_scheduler(V),
        sd_scheduler(V, zero_snr=True),
        DPMSolverMultistepScheduler.from_config(sd_scheduler(V, zero_snr=True).config, timestep_spacing="linspace"),
        EulerDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config),
        PNDMScheduler.from_config(sd_scheduler(V).config),
        ZeroSNRMultistepScheduler(prediction_type=V),
        ZeroSNRMultistepScheduler(rescale_betas_zero_snr=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_is_right_stays(scheduler, config_of, said):
    """As stock loads it; and one that is given stays whatever it is."""
    folder = config_of("1", scheduler)
    loaded = load_pipeline(folder).scheduler
    assert type(loaded) is type(scheduler)
    assert settings(loaded) == settings(scheduler)
    mine = HeunDiscreteScheduler(steps_offset=1)
    assert load_pipeline(folder, scheduler=mine).scheduler is mine
    assert said("WARNING") == []


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler.from_config(sd_scheduler(V, zero_snr=True).config, timestep_spacing="leading"),
        HeunDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config),
    ],
    ids=["never at the last timestep", "ignores the flag"],
)
def test_a_scheduler_that_does_not_do_what_it_says_is_replaced(scheduler, config_of):
    loaded = load_pipeline(config_of("1", scheduler)).scheduler
    assert type(loaded) is ZeroSNRDDIMScheduler
    assert loaded.alphas_cumprod[-1] == 0
    loaded.set_timesteps(7)
    assert loaded.timesteps[0] == 999
    assert loaded.config["beta_start"] == scheduler.config["beta_start"]


def test_the_caller_knows_better_than_a_folder(configs, config_of):
    told = load_pipeline(configs["1"], prediction_type=V)
    assert type(told.scheduler) is DDIMScheduler
    assert says(told) == (V, False)
    ours = config_of("1", ZeroSNRMultistepScheduler(rescale_betas_zero_snr=False, timestep_spacing="leading"))
    told = load_pipeline(ours, prediction_type=V, rescale_betas_zero_snr=True)
    assert type(told.scheduler) is ZeroSNRMultistepScheduler
    assert says(told) == (V, True)
    assert told.scheduler.config["timestep_spacing"] == "trailing"
    with pytest.raises(ValueError, match="Pass either scheduler or prediction_type"):
        load_pipeline(configs["1"], prediction_type=V, scheduler=sd_scheduler())


def test_what_has_no_betas_is_not_told(config_of):
    folder = config_of("1", FlowMatchEulerDiscreteScheduler())
    assert type(load_pipeline(folder).scheduler) is FlowMatchEulerDiscreteScheduler
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no scheduler with betas"):
        load_pipeline(folder, prediction_type=V)


FROM_THE_HUB = """
import sys, zsnr_diffusers
from zsnr_diffusers.model_facts import find_model_facts
facts = find_model_facts("acme/dark")
pipe = zsnr_diffusers.load_pipeline("acme/dark")
file = zsnr_diffusers.load_pipeline(sys.argv[1], config="acme/dark")
told = zsnr_diffusers.load_pipeline("acme/dark", prediction_type="epsilon", rescale_betas_zero_snr=False)
print(facts)
for one in (pipe, file, told):
    config = one.scheduler.config
    print(type(one.scheduler).__name__, config.prediction_type, config.rescale_betas_zero_snr)
"""


def test_from_the_hub(config_of, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["v_pred"])
    (tmp_path / "repo").mkdir()
    load_pipeline(config_of("1", sd_scheduler(V, zero_snr=True))).save_pretrained(tmp_path / "repo")
    with serve({"acme/dark": tmp_path / "repo"}) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", FROM_THE_HUB, file]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    config = "the scheduler's config"
    assert result.stdout.splitlines() == [
        f"prediction_type='v_prediction' by {config}, rescale_betas_zero_snr=True by {config}",
        "DDIMScheduler v_prediction True",
        "DDIMScheduler v_prediction False",  # as programs read a file with v_pred alone
        "DDIMScheduler epsilon False",
    ], result.stderr


# -- saving


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scheduler",
    [sd_scheduler(), sd_scheduler(V), ZeroSNRMultistepScheduler.from_config(sd_scheduler(V).config)],
    ids=["epsilon", "v", "zero SNR"],
)
def test_single_files_round_trip(kind, scheduler, configs, tmp_path):
    pipe, zero_snr = tiny_pipeline(kind, scheduler), scheduler.config["rescale_betas_zero_snr"]
    if zero_snr:
        enable_guidance_rescale(pipe, 0.4, space="v")
    file = save_pipeline(pipe, tmp_path / "one" / "model.safetensors")
    back = load_pipeline(file, config=configs[kind])
    assert_same_weights(pipe, back)
    assert says(back) == (scheduler.config["prediction_type"], zero_snr)
    assert getattr(back, "default_guidance_rescale", 0.0) == (0.4 if zero_snr else 0.0)
    if zero_snr:
        assert back.guidance_space == "v"
        back.scheduler = scheduler  # the sampler is not the model's
    assert torch.equal(paint(back), paint(pipe))
    again = save_pipeline(back, tmp_path / "two" / "model.safetensors")
    assert content(again) == content(file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.safetensors"] * 2 + ["one", "two"]


def content(file):
    """Header and weights; the library writes metadata in any order."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


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
        "resolution": "32x32",
        "prediction_type": prediction_type,
    }
    metadata.pop("zsnr_diffusers")
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    facts = find_model_facts(tmp_path / "other.safetensors")
    assert facts.prediction_type == scheduler.config.prediction_type
    assert bool(facts.rescale_betas_zero_snr) == scheduler.config.rescale_betas_zero_snr
    assert facts.conflicts == []


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
        (FlowMatchEulerDiscreteScheduler(), "not prediction_type=None"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(scheduler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_pipeline(tiny_pipeline("1", scheduler), tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_a_single_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DDIMPipeline \(unet: UNet2DModel\) does not fit into a single file"):
        save_pipeline(tiny_unconditional(), tmp_path / "model.safetensors")


WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
painted = []
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 7, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent"}
    images = pipe("a dark landscape", generator=generator, guidance_rescale=0.4, **call).images
    painted.append((type(pipe.scheduler).__name__, images))
torch.save(painted, sys.argv[1])
"""


def test_a_folder_opens_and_paints_the_same_where_this_package_is_not(tmp_path):
    expected = []
    for kind in KINDS:
        pipe = tiny_pipeline(kind, ZeroSNRMultistepScheduler.from_config(sd_scheduler(V).config))
        enable_guidance_rescale(pipe, 0.4)
        save_pipeline(pipe, tmp_path / kind)
        index = json.loads((tmp_path / kind / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
        assert index["_guidance_rescale"] == 0.4
        assert "default_guidance_rescale = 0.4" in (tmp_path / kind / "pipeline.py").read_text()
        pipe.scheduler = ZeroSNRDDIMScheduler.from_config(sd_scheduler(V).config)
        expected.append(paint(pipe, 7))
    command = [sys.executable, "-c", WITHOUT_US, tmp_path / "painted.pt", *(tmp_path / kind for kind in KINDS)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "are not expected" not in result.stderr  # what stock says of a config that it does not understand
    for (name, images), latents in zip(torch.load(tmp_path / "painted.pt"), expected, strict=True):
        assert name == "EulerDiscreteScheduler"
        # stock stands in for SNR 0 with 2^-24, so with 2^-12 of the amplitude
        torch.testing.assert_close(images, latents, rtol=0, atol=2**-12 * latents.abs().max().item())


def test_folders_keep_what_is_stock_s(tmp_path):
    pipe = tiny_pipeline("1", DPMSolverMultistepScheduler.from_config(sd_scheduler(V, zero_snr=True).config))
    scheduler = pipe.scheduler
    enable_guidance_rescale(pipe, 0.4)
    disable_guidance_rescale(pipe)
    folder = save_pipeline(pipe, tmp_path / "pipe", format="diffusers")
    back = load_pipeline(folder)
    assert settings(back.scheduler) == settings(scheduler)
    assert_same_weights(pipe, back)
    assert not (folder / "pipeline.py").exists()
    assert torch.equal(paint(back), paint(pipe))


def test_models_of_pixels_keep_their_clipping(tmp_path):
    scheduler = ZeroSNRDDPMScheduler(prediction_type=V, clip_sample=True, variance_type="fixed_large")
    folder = save_pipeline(class_conditional(scheduler), tmp_path / "classes")
    back = load_pipeline(folder).scheduler
    assert type(back) is DDPMScheduler
    facts = ("prediction_type", "rescale_betas_zero_snr", "clip_sample", "variance_type", "timestep_spacing")
    assert [back.config[fact] for fact in facts] == [V, True, True, "fixed_large", "trailing"]


def test_a_schedule_that_no_stock_scheduler_here_knows_is_refused(tmp_path):
    pipe = tiny_pipeline("1", ZeroSNRDDIMScheduler(prediction_type=V, snr_shift_scale=3.0))
    with pytest.raises(ValueError, match=r"snr_shift_scale=3\.0"):
        save_pipeline(pipe, tmp_path / "pipe")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors"])
def test_what_is_there_is_replaced_on_demand_alone(name, configs, tmp_path, monkeypatch):
    target, pipe = tmp_path / name, tiny_pipeline("1")
    save_pipeline(pipe, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="is there already"):
        save_pipeline(pipe, target)
    with monkeypatch.context() as patch:
        patch.setattr("zsnr_diffusers.single_file.save_file", full_disk)
        patch.setattr("zsnr_diffusers.hub.write_custom_pipeline", full_disk)
        with pytest.raises(OSError, match="the disk is full"):
            save_pipeline(enable_guidance_rescale(pipe), target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other = tiny_pipeline("1", sd_scheduler(V))
    (target / "stale").touch() if target.is_dir() else None
    save_pipeline(other, target, overwrite=True)
    assert says(load_pipeline(target, **({"config": configs["1"]} if target.suffix else {}))) == (V, False)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (target / "stale").exists()


def full_disk(*args):
    """Stands for what writes last."""
    next(Path(arg, "half") if Path(arg).is_dir() else Path(arg) for arg in args if isinstance(arg, Path)).touch()
    raise OSError("the disk is full")


def test_folders_of_other_things_are_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    save_pipeline(tiny_pipeline("1"), tmp_path / "photos")  # an empty one may be filled
    (tmp_path / "letters").mkdir()
    Path(tmp_path, "letters", "a.txt").touch()
    with pytest.raises(FileExistsError, match="is a folder without a pipeline"):
        save_pipeline(tiny_pipeline("1"), tmp_path / "letters", overwrite=True)


@pytest.mark.parametrize(("name", "format"), [("pipe", "single_file"), ("a.safetensors", "diffusers"), ("pipe", "x")])
def test_a_name_that_does_not_go_with_the_format_is_refused(name, format, tmp_path):
    with pytest.raises(ValueError, match=f"format='{format}' does not go with"):
        save_pipeline(tiny_pipeline("1"), tmp_path / name, format=format)

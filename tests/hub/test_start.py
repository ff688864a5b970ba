"""A start on its way: beside a saved pipeline, onto the Hub and back, and to people who do not have this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from guided_pipelines import generate
from published_models import IN_MEMORY, in_memory
from small_pipelines.published import BASES
from starts import MODELS, fitted, quiet, strong_start

from zsnr_diffusers import enable_guidance_rescale, enable_start, load_pipeline, save_pipeline
from zsnr_diffusers.hub.custom_pipeline import custom_pipeline_source
from zsnr_diffusers.start import START_FILE, Start, StartMixin, hand_set_start

# A process in which the package does not exist; what it generates goes to a file.
WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
repo, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
IN_MEMORY
generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
call = {"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent", "generator": generator}
torch.save([type(pipe).__name__, pipe("a dark landscape", num_images_per_prompt=2, **call).images], target)
""".replace("IN_MEMORY", IN_MEMORY)


def same(one, other):
    laws = [(start.law.bias, start.law.weight, start.law.covariance, start.law.bounds) for start in (one, other)]
    return all(map(torch.equal, *laws)) and one.base == other.base and one.report == other.report


@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_all_of_it(name, tmp_path):
    start = fitted(name)
    again = Start.load(start.save(tmp_path / "new" / "start.safetensors"))
    assert same(again, start)
    assert all(torch.equal(again.weights[part], start.weights[part]) for part in start.weights)
    assert {*start.weights} == {"vae", "text_encoder", *(["text_encoder_2"] if name == "xl" else [])}
    assert Start.from_text(start.to_text()).base == start.base
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["start.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_beside_the_pipeline_and_loaded_again(name, tmp_path):
    pipe = quiet(name)
    start = strong_start(pipe)
    stock = generate(pipe)
    enable_start(pipe, start)
    expected = generate(pipe)
    folder = save_pipeline(pipe, tmp_path / "saved")
    loaded = in_memory(load_pipeline(folder))
    loaded.set_progress_bar_config(disable=True)
    assert same(loaded.default_start, start)
    assert torch.equal(generate(loaded), expected)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_start"] == START_FILE
    assert index["_class_name"] == type(pipe).__name__
    plain = in_memory(DiffusionPipeline.from_pretrained(folder))
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(generate(plain), stock)


def test_guidance_rescale_and_start_are_both_recorded(tmp_path):
    pipe = quiet("1.5")
    enable_guidance_rescale(enable_start(pipe, strong_start(pipe)), 0.4)
    expected = generate(pipe)
    loaded = in_memory(load_pipeline(save_pipeline(pipe, tmp_path / "saved")))
    loaded.set_progress_bar_config(disable=True)
    assert loaded.default_guidance_rescale == 0.4
    assert torch.equal(generate(loaded), expected)


def test_a_class_with_the_mixin_saves_and_loads_it_by_itself(tmp_path):
    class Mine(StartMixin, StableDiffusionXLPipeline):
        pass

    pipe = quiet("xl")
    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    enable_start(mine, strong_start(pipe))
    expected = generate(mine)
    mine.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    again = in_memory(Mine.from_pretrained(tmp_path / "saved"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), expected)


def test_it_is_left_out_or_exchanged_where_that_is_asked_for(tmp_path):
    pipe = quiet("1.5")
    stock = generate(pipe)
    start, other = strong_start(pipe), hand_set_start(pipe, brightness=-0.9)
    folder = save_pipeline(enable_start(pipe, start), tmp_path / "saved")
    enable_start(pipe, other)
    expected = generate(pipe)
    path = other.save(tmp_path / "other.safetensors")
    (folder / START_FILE).write_bytes(b"damaged")  # it is not read
    for given, images in ((False, stock), (other, expected), (str(path), expected)):
        loaded = in_memory(load_pipeline(folder, start=given))
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, StartMixin) == (given is not False)
        assert torch.equal(generate(loaded), images)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_pipeline("no/model", start="nowhere.safetensors")
    with pytest.raises(ValueError, match=r"start\.safetensors is damaged"):
        load_pipeline(folder)


@pytest.mark.full
@pytest.mark.parametrize("name", BASES)
def test_onto_the_hub_and_back(name, tmp_path, there, hub):
    """Fitted by the model's own tokenizers and text encoders."""
    pipe, start = quiet(name), fitted(name)
    enable_start(pipe, start)
    expected = generate(pipe)
    repos, _, places = there()
    save_pipeline(pipe, tmp_path / "saved", push_to_hub="acme/started")
    repo = repos["acme/started"]
    assert {START_FILE, "pipeline.py"} <= {path.name for path in repo.iterdir()}
    card = (repo / "README.md").read_text()
    k = start.law.frequencies
    assert (
        f"| start | the lowest {k} x {k} frequencies that the model expects in x_T, in `start.safetensors` |" in card
    )
    assert "`pipeline.py` in this repo adds the start" in card
    loaded = in_memory(load_pipeline("acme/started", **places))
    loaded.set_progress_bar_config(disable=True)
    assert same(loaded.default_start, start)
    assert torch.equal(generate(loaded), expected)
    (repo / START_FILE).unlink()
    with pytest.raises(OSError, match=r"acme/started .*start.safetensors"):
        load_pipeline("acme/started", **hub(repos))


@pytest.mark.full
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("phi", [0.0, 0.4])
def test_people_without_this_package_have_it_too(name, phi, tmp_path):
    pipe = quiet(name)
    enable_start(pipe, fitted(name))
    if phi:
        enable_guidance_rescale(pipe, phi)
    folder = save_pipeline(pipe, tmp_path / "saved")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    target = tmp_path / "generated.pt"
    command = [sys.executable, "-c", WITHOUT_US, str(folder), str(target)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, generated = torch.load(target)
    assert found == f"Rescaled{type(pipe).__name__}"
    assert torch.equal(generated, generate(pipe))


def test_a_pipeline_without_a_start_has_nothing_of_it_in_its_file():
    pipe = quiet("1.5")
    assert "LowFrequencyLaw" not in custom_pipeline_source(type(pipe), 0.7)
    source = custom_pipeline_source(type(pipe), 0.0, start=hand_set_start(pipe, brightness=0.5))
    assert max(map(len, source.splitlines())) < 140
    compile(source, "pipeline.py", "exec")


def test_a_single_file_says_that_it_holds_none(tmp_path, log):
    pipe = quiet("1.5")
    save_pipeline(enable_start(pipe, strong_start(pipe)), tmp_path / "model.safetensors")
    assert "model.safetensors cannot contain the start" in log.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is damaged or not a safetensors file"),
        (lambda content: content[:100], "is damaged or not a safetensors file"),
        (lambda content: content.replace(b"zsnr_diffusers_start", b"zsnr_diffusers_other"), "is not a start of zsnr"),
        (
            lambda content: content.replace(b'\\"version\\": 1', b'\\"version\\": 9'),
            "is of version 9; expected version 1",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(damage, message, tmp_path):
    content = fitted("1.5").to_bytes()
    (tmp_path / "start.safetensors").write_bytes(damage(content))
    with pytest.raises(ValueError, match=message) as raised:
        enable_start(quiet("1.5"), tmp_path / "start.safetensors")
    assert "start.safetensors" in str(raised.value)
    assert "zsnr fit-start BASE" in str(raised.value)


def test_a_law_that_does_not_hold_together_is_refused(tmp_path):
    start = fitted("1.5")
    law = start.law
    for change, message in (
        ({"bias": law.bias[:2]}, "its shapes are inconsistent"),
        ({"weight": law.weight.flatten()}, "its shapes are inconsistent"),
        ({"covariance": law.covariance * float("nan")}, "covariance is not finite"),
    ):
        broken = type(law)(**{**vars(law), **change})
        path = Start(broken, start.base, start.weights, start.report).save(tmp_path / "start.safetensors")
        with pytest.raises(ValueError, match=message):
            Start.load(path)

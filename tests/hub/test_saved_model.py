"""What a saved model says of itself, found without its weights, and read once."""

import builtins
import io
import json
import struct
import sys
import tracemalloc
from collections import Counter
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tiny_adapters import adapted
from tiny_checkpoints import EPSILON, V, sd_scheduler, tiny_pipeline, write_file
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

import zsnr_diffusers
from zsnr_diffusers import audit, enable_guidance_rescale, load_lora, load_pipeline, save_lora
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub import files
from zsnr_diffusers.hub import header as header_module
from zsnr_diffusers.hub.files import INDEX, SCHEDULER_CONFIG
from zsnr_diffusers.hub.header import is_single_file, read_header
from zsnr_diffusers.hub.lora_files import LORA_FILE
from zsnr_diffusers.hub.saved_model import SCHEDULER_FILE, SavedModel

FLOW = "flow_prediction"
PACKAGE = Path(zsnr_diffusers.__file__).parent


@pytest.fixture
def write(tmp_path):
    """Write a file that has keys and metadata, but no weights."""

    def write_file(keys=(), **metadata):
        tensors = {key: torch.empty(0) for key in ("weight", *keys)}
        save_file(tensors, tmp_path / "model.safetensors", metadata or None)
        return tmp_path / "model.safetensors"

    return write_file


def found(source, **options):
    saved = SavedModel.open(source, **options)
    return saved.prediction_type, saved.rescale_betas_zero_snr


MARKS = {
    "nothing": ({}, (None, None)),
    "v_pred": ({"keys": ["v_pred"]}, (V, False)),
    "v_pred and ztsnr": ({"keys": ["v_pred", "ztsnr"]}, (V, True)),
    "ztsnr": ({"keys": ["ztsnr"]}, (None, True)),
    "modelspec v": ({"modelspec.prediction_type": "v"}, (V, None)),
    "modelspec V_Prediction": ({"modelspec.prediction_type": "V_Prediction"}, (V, None)),
    "modelspec epsilon": ({"modelspec.prediction_type": "epsilon"}, (EPSILON, None)),
    "modelspec other": ({"modelspec.prediction_type": "rf"}, (None, None)),
    "modelspec 2-v": ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (V, None)),
    "modelspec 2": ({"modelspec.architecture": "stable-diffusion-v2-512"}, (EPSILON, None)),
    "modelspec 2-v LoRA": ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, (V, None)),
    "modelspec flow": ({"modelspec.prediction_type": "flow_prediction"}, (FLOW, None)),
    "velocity of a flow": (
        {"modelspec.noise_process": "flow", "modelspec.prediction_type": "velocity"},
        (FLOW, None),
    ),
    "velocity of another process": (
        {"modelspec.noise_process": "ddpm", "modelspec.prediction_type": "velocity"},
        (V, None),
    ),
    "noise of a flow": ({"modelspec.noise_process": "flow", "modelspec.prediction_type": "epsilon"}, (None, None)),
    "plain flow_prediction": ({"prediction_type": "flow_prediction"}, (FLOW, None)),
    "our flow": ({"zsnr_diffusers": json.dumps({"prediction_type": "flow_prediction", "shift": 3.0})}, (FLOW, None)),
    "ComfyUI v": ({"modelspec.predict_key": "v"}, (V, None)),
    "ComfyUI epsilon": ({"modelspec.predict_key": "epsilon"}, (EPSILON, None)),
    "plain v": ({"prediction_type": "v"}, (V, None)),
    "plain v_prediction": ({"prediction_type": "v_prediction", "zero_terminal_snr": "True"}, (V, True)),
    "plain epsilon": ({"prediction_type": "epsilon", "ztsnr": "false"}, (EPSILON, False)),
    "plain other": ({"prediction_type": "flow"}, (None, None)),
    "kohya's v": ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (V, True)),
    "kohya's base": ({"ss_base_model_version": "sd_v2_v"}, (V, None)),
    "ours": ({"zsnr_diffusers": json.dumps({"prediction_type": V, "rescale_betas_zero_snr": True})}, (V, True)),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_a_file(name, write):
    marks, expected = MARKS[name]
    assert found(write(**marks)) == expected


ORDER = [
    ("the arguments", "options", {"prediction_type": "sample"}, "sample"),
    ("metadata zsnr_diffusers", "file", {"zsnr_diffusers": json.dumps({"prediction_type": EPSILON})}, EPSILON),
    ("key v_pred", "file", {"keys": ["v_pred"]}, V),
    ("modelspec metadata", "file", {"modelspec.prediction_type": "epsilon"}, EPSILON),
    ("the scheduler's config", "options", {}, V),
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_order_of_places(first, write, tmp_path):
    """All that come later say something too."""
    sd_scheduler(V).save_pretrained(tmp_path / "config" / "scheduler")
    marks, options = {}, {"config": tmp_path / "config"}
    for _, kind, said, _ in ORDER[first:]:
        (options if kind == "options" else marks).update(said)
    saved = SavedModel.open(write(**marks), **options)
    source, _, _, expected = ORDER[first]
    assert (saved.authority("prediction_type").source, saved.prediction_type) == (source, expected)
    assert f"prediction_type={expected!r} by {source}" in saved.facts
    others = [place[0] for place in ORDER[first + 1 :] if place[3] != expected]
    said = [line for line in saved.conflicts if line.startswith("prediction_type")]
    if first == 0:
        assert said == []  # the caller has decided
    else:
        assert len(said) == len(others)
        for line, other in zip(said, others, strict=True):
            assert f"{expected!r} according to {source}, which is used" in line
            assert f"according to {other}. Pass prediction_type= to decide" in line


def test_places_that_agree_are_no_conflict(write, tmp_path):
    sd_scheduler(V, zero_snr=True).save_pretrained(tmp_path / "config" / "scheduler")
    file = write(keys=["v_pred", "ztsnr"], **{"modelspec.prediction_type": "v"})
    assert SavedModel.open(file, config=tmp_path / "config").conflicts == []


def test_what_save_pipeline_records(write):
    schedule = {"beta_start": 0.1, "num_train_timesteps": 7}
    record = {**schedule, "prediction_type": V, "_guidance_rescale": 0.4, "_guidance_rescale_space": "v", "other": 1}
    saved = SavedModel.open(write(zsnr_diffusers=json.dumps(record)))
    assert saved.schedule == schedule
    assert saved.guidance == {"guidance_rescale": 0.4, "space": "v", "keep_low_frequencies": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "model.safetensors: its metadata 'zsnr_diffusers' is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"prediction_type": "eps"}', "model.safetensors: its metadata .* prediction_type='eps' is unknown"),
        ('{"prediction_type": ["epsilon"]}', "must be a text"),
        ('{"rescale_betas_zero_snr": "false"}', "must be true or false"),
        ('{"num_train_timesteps": 1000000000}', "must be an integer from 1 to 100000"),
        ('{"beta_end": NaN}', "beta_end=nan must be a number"),
        ('{"_guidance_rescale": 7}', "guidance_rescale=7 must lie in"),
    ],
)
def test_records_that_cannot_be_read(record, message, write):
    with pytest.raises(ValueError, match=message):
        SavedModel.open(write(zsnr_diffusers=record))


@pytest.mark.parametrize("key", ["edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"])
def test_edm_models_are_refused(key, write):
    """CosXL and Playground 2.5, which have the weights of XL otherwise."""
    with pytest.raises(ValueError, match=rf"has the key '{key}': it is for an EDM schedule"):
        SavedModel.open(write(keys=[key, "v_pred"]))


SCHEDULES = {
    "alphas_cumprod": lambda scheduler: scheduler.alphas_cumprod,
    "model.alphas_cumprod": lambda scheduler: scheduler.alphas_cumprod,
    "sqrt_alphas_cumprod": lambda scheduler: scheduler.alphas_cumprod.sqrt(),
    "betas": lambda scheduler: scheduler.betas,
    "model.betas": lambda scheduler: scheduler.betas,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("key", SCHEDULES)
def test_a_schedule_among_the_weights_that_ends_at_zero_says_so(key, dtype, tmp_path):
    """One that does not says nothing: programs copy that of the base."""
    zero_snr = sd_scheduler(V, zero_snr=True)
    others = [sd_scheduler(V), DDIMScheduler()]
    for scheduler, said in ((zero_snr, True), *((other, None) for other in others[: 1 if dtype.itemsize < 4 else 2])):
        save_file({key: SCHEDULES[key](scheduler).to(dtype)}, tmp_path / "model.safetensors")
        assert found(tmp_path / "model.safetensors") == (None, said)


def test_stand_ins_for_zero_in_a_schedule(tmp_path):
    table = torch.linspace(1, 2**-24, 10)
    save_file({"alphas_cumprod": table, "betas": torch.zeros(())}, tmp_path / "model.safetensors")
    assert found(tmp_path / "model.safetensors") == (None, True)


def of_stability_ai(scaling, levels="LegacyDDPMDiscretization"):
    module = "sgm.modules.diffusionmodules"
    parts = {"scaling_config": f"{module}.denoiser_scaling.{scaling}", "discretization_config": f"{module}.{levels}"}
    return {"denoiser_config": {"params": {part: {"target": target} for part, target in parts.items()}}}


ORIGINAL = {
    "CompVis' v": ({"parameterization": "v"}, (V, None)),
    "CompVis' epsilon": ({"parameterization": "eps"}, (EPSILON, None)),
    "CompVis' default": ({"linear_start": 0.00085}, (None, None)),
    "v at zero SNR": ({"parameterization": "v", "zero_terminal_snr": True}, (V, True)),
    "Stability AI's v": (of_stability_ai("VScaling"), (V, None)),
    "Stability AI's epsilon": (of_stability_ai("EpsScaling"), (EPSILON, None)),
    "Stability AI's zero SNR": (of_stability_ai("VScaling", "ZeroSNRDDPMDiscretization"), (V, True)),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_configs_given_or_beside_the_file(name, write, tmp_path):
    parameters, expected = ORIGINAL[name]
    content, file = {"model": {"target": "ldm", "params": parameters}}, write()
    given = tmp_path / "given.yml"
    given.write_text(json.dumps(content))  # JSON is YAML too
    for config in (given, str(given), content):
        assert found(file, original_config=config) == expected
    given.rename(tmp_path / "model.yaml")
    assert found(file) == expected
    assert found(file, prediction_type="sample") == ("sample", expected[1])


def test_an_original_config_that_is_none_is_named(write, tmp_path):
    file, config = write(), tmp_path / "model.yaml"
    for content, message in (("{", "is not valid YAML"), ("[1]", "no model.params"), ("\xff", "is not valid YAML")):
        config.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"model\.yaml .*{message}"):
            SavedModel.open(file)
    config.unlink()
    for config in (tmp_path / "nowhere.yaml", "https://example.org/v2.yaml"):
        with pytest.raises(FileNotFoundError, match=r"No such file: .*\.yaml. For a URL, download the file"):
            SavedModel.open(write(keys=["v_pred"]), original_config=config)


# Folders


@pytest.mark.parametrize("prediction_type", [V, EPSILON])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_folders_say_it_in_the_scheduler_s_config(prediction_type, zero_snr, tmp_path):
    pipe = tiny_stable_diffusion(sd_scheduler(prediction_type, zero_snr))
    enable_guidance_rescale(pipe, 0.3).save_pretrained(tmp_path)
    saved = SavedModel.open(tmp_path)
    assert (saved.prediction_type, saved.rescale_betas_zero_snr) == (prediction_type, zero_snr)
    assert saved.guidance["guidance_rescale"] == 0.3
    assert found(tmp_path, prediction_type="sample", rescale_betas_zero_snr=not zero_snr) == ("sample", not zero_snr)
    given = {"scheduler": EulerDiscreteScheduler(prediction_type="sample")}
    assert found(tmp_path, **given) == ("sample", False)
    assert SavedModel.open(tmp_path, **given).conflicts == []


# What is no model


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file: .*hf_hub_download\(repo, name\)"):
        SavedModel.open(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="has no pipeline"):
        SavedModel.open(tmp_path, only_pipelines=True)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.ckpt is not a \.safetensors file\. Reading a pickled checkpoint"):
        SavedModel.open(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="prediction_type='eps' is unknown"):
        SavedModel.open(tmp_path, prediction_type="eps")
    (tmp_path / "folder.safetensors").mkdir()
    assert not is_single_file(tmp_path / "folder.safetensors")


WHOLE = save({"weight": torch.ones(2), "v_pred": torch.empty(0)}, {"modelspec.prediction_type": "v"})


def header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def entry(**changes):
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
        "a length beyond the file": struct.pack("<Q", 90_000_000) + b"{}",
        "no JSON": header(b"{" * 50),
        "deep JSON": header(b"[" * 1_000_000),
        "no UTF-8": header(b'{"\xff": 1}'),
        "a list": header([]),
        "metadata of numbers": header({"__metadata__": {"modelspec.prediction_type": 1}}),
        "metadata twice": header(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}'),
        "a key twice": header(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry(data_offsets=[4, 8]))}}}'.encode())
        + bytes(8),
        "a negative size": header({"a": entry(shape=[-1])}) + bytes(4),
        "a size beyond counting": header({"a": entry(shape=[2**62, 8])}) + bytes(4),
        "an unknown dtype": header({"a": entry(dtype="F99")}) + bytes(4),
        "weights cut off": WHOLE[:-1],
        "more than the weights": WHOLE + b"x",
        "another file": b"PK\x03\x04" + bytes(100),
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_files_are_named(content, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[1])
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged or not a safetensors file: "):
        SavedModel.open(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(header),
        st.integers(0, len(WHOLE) - 1).map(lambda end: WHOLE[:end]),
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)).map(
            lambda change: WHOLE[: change[0]] + bytes([change[1]]) + WHOLE[change[0] + 1 :]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ).map(lambda value: header({"__metadata__": value, "a": value})),
    )
)
@example(struct.pack("<Q", 99_999_999) + b"{}")
def test_any_bytes_are_a_header_or_refused_with_the_name(tmp_path, content):
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        outcome = SavedModel.open(path)
    except ValueError as error:
        outcome = error
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # Python reads no weights, whatever length a header claims; the library maps the file
    if isinstance(outcome, ValueError):
        assert "any.safetensors" in str(outcome)
    else:
        assert all(isinstance(value, str) for value in read_header(path).metadata.values())


# -- how often


@pytest.fixture
def reads(monkeypatch):
    """How often this package's code has opened a file of this name, and asked the Hub for it."""
    counted, opener, download, opened_weights = Counter(), open, files.hf_hub_download, header_module.safe_open

    def open_file(file, *args, **kwargs):
        frame = sys._getframe(1)
        while "pathlib" in frame.f_code.co_filename:
            frame = frame.f_back
        counted[Path(str(file)).name] += Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
        return opener(file, *args, **kwargs)

    def ask(repo, name, **kwargs):
        counted["asked", name] += 1
        return download(repo, name, **kwargs)

    def open_weights(file, *args, **kwargs):
        counted[Path(file).name] += 1
        return opened_weights(file, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", open_file)
    monkeypatch.setattr(files, "hf_hub_download", ask)
    monkeypatch.setattr(header_module, "safe_open", open_weights)

    def of(call, *names):
        counted.clear()
        call()
        return tuple(counted[name] for name in names)

    return of


READERS = [SavedModel.open, load_pipeline, partial(audit, steps=(5,)), partial(audit, steps=(5,), deep=True)]


@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_each_call_reads_the_files_of_a_pipeline_once(place, reads, hub, tmp_path):
    tiny_unconditional().save_pretrained(tmp_path)
    source, places = (tmp_path, {}) if place == "folder" else ("acme/dark", hub({"acme/dark": tmp_path}))
    names = (INDEX, SCHEDULER_CONFIG, ("asked", INDEX), ("asked", SCHEDULER_FILE))
    for reader in READERS:
        asked = int(place == "Hub")
        assert reads(partial(reader, source, **places), *names) == (1, 1, asked, asked), reader
    opened = SavedModel.open(source, **places)
    for reader in READERS:  # where it lies goes along
        assert reads(partial(reader, opened), *names) == (0, 0, 0, 0), reader


def test_each_call_reads_the_header_of_a_file_once(reads, configs, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["v_pred"])
    load = partial(load_pipeline, config=configs["1"])
    for reader in (SavedModel.open, load, READERS[2]):
        assert reads(partial(reader, file), file.name) == (1,)
    opened = SavedModel.open(file, config=configs["1"])
    for reader in READERS:
        assert reads(partial(reader, opened), file.name) == (0,)
    convert = ["convert", file, tmp_path / "folder", "--config", configs["1"]]
    assert reads(lambda: main([*map(str, convert)]), file.name) == (1,)


@pytest.mark.full
def test_each_call_reads_the_header_of_a_lora_once(reads, configs, tmp_path):
    folder = save_lora(adapted(target_modules=["to_k"]), tmp_path / "lora")
    for reader in (SavedModel.open, partial(load_lora, tiny_pipeline("1")), READERS[2]):
        assert reads(partial(reader, folder), LORA_FILE) == (1,)
    assert reads(partial(load_lora, tiny_pipeline("1"), SavedModel.open(folder)), LORA_FILE) == (0,)
    convert = ["convert", folder, tmp_path / "lora.safetensors", "--config", configs["1"]]
    assert reads(lambda: main([*map(str, convert)]), LORA_FILE) == (1,)


# -- once more, with what a caller knows


def test_what_was_opened_takes_what_is_known_better(write, tmp_path):
    opened = SavedModel.open(write(keys=["v_pred"]))
    assert found(opened, prediction_type="sample") == ("sample", False)
    assert found(opened, rescale_betas_zero_snr=True) == (V, True)
    assert found(opened) == (V, False)  # which is as it was
    sd_scheduler(EPSILON).save_pretrained(tmp_path / "config" / "scheduler")
    (conflict,) = SavedModel.open(opened, config=tmp_path / "config").conflicts
    assert conflict.startswith("prediction_type is 'v_prediction' according to key v_pred")
    again = SavedModel.open(SavedModel.open(opened, config=tmp_path / "config"), config=tmp_path / "config")
    assert again.conflicts == [conflict]


def test_it_cannot_be_changed(write):
    with pytest.raises(FrozenInstanceError):
        SavedModel.open(write()).name = "another"


def test_the_scheduler_beside_a_lora_is_none_of_its_claims(tmp_path):
    """An audit holds the one against the other."""
    save_lora(adapted(target_modules=["to_k"]), tmp_path)
    sd_scheduler(EPSILON).save_pretrained(tmp_path / "scheduler")
    opened = SavedModel.open(tmp_path)
    assert opened.is_lora
    assert (opened.prediction_type, opened.conflicts) == (V, [])
    assert opened.scheduler_config["prediction_type"] == EPSILON
    with pytest.raises(OSError, match="Load a LoRA into a pipeline of its base with load_lora"):
        load_pipeline(opened)


def test_a_scheduler_alone_and_nothing(tmp_path):
    nothing = SavedModel.open(tmp_path)
    assert (nothing.index, nothing.scheduler_config, nothing.header.shapes) == ({}, None, {})
    sd_scheduler(V).save_pretrained(tmp_path)
    alone = SavedModel.open(tmp_path)
    assert (alone.scheduler_file, alone.prediction_type) == (SCHEDULER_CONFIG, V)

"""What a saved model says of itself, found without its weights."""

import json
import struct
import tracemalloc

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tiny_checkpoints import sd_scheduler
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import ZeroSNRMultistepScheduler, enable_guidance_rescale
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.model_facts import Claim, find_model_facts, is_single_file, scheduler_claim

V, EPSILON = "v_prediction", "epsilon"


@pytest.fixture
def write(tmp_path):
    """Write a file that has keys and metadata, but no weights."""

    def write_file(keys=(), **metadata):
        tensors = {key: torch.empty(0) for key in ("weight", *keys)}
        save_file(tensors, tmp_path / "model.safetensors", metadata or None)
        return tmp_path / "model.safetensors"

    return write_file


def found(source, **options):
    facts = find_model_facts(source, **options)
    return facts.prediction_type, facts.rescale_betas_zero_snr


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
    facts = find_model_facts(write(**marks), **options)
    source, _, _, expected = ORDER[first]
    assert (facts.authority("prediction_type").source, facts.prediction_type) == (source, expected)
    assert f"prediction_type={expected!r} by {source}" in str(facts)
    others = [place[0] for place in ORDER[first + 1 :] if place[3] != expected]
    said = [line for line in facts.conflicts if line.startswith("prediction_type")]
    if first == 0:
        assert said == []  # the caller has decided
    else:
        assert len(said) == len(others)
        for line, other in zip(said, others, strict=True):
            assert f"{expected!r} by {source}, which counts" in line
            assert f"by {other}. Pass prediction_type= to decide" in line


def test_places_that_agree_are_no_conflict(write, tmp_path):
    sd_scheduler(V, zero_snr=True).save_pretrained(tmp_path / "config" / "scheduler")
    file = write(keys=["v_pred", "ztsnr"], **{"modelspec.prediction_type": "v"})
    assert find_model_facts(file, config=tmp_path / "config").conflicts == []


def test_what_save_pipeline_records(write):
    schedule = {"beta_start": 0.1, "num_train_timesteps": 7}
    record = {**schedule, "prediction_type": V, "_guidance_rescale": 0.4, "_guidance_rescale_space": "v", "other": 1}
    facts = find_model_facts(write(zsnr_diffusers=json.dumps(record)))
    assert facts.schedule == schedule
    assert facts.guidance == {"guidance_rescale": 0.4, "space": "v"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "model.safetensors: its metadata 'zsnr_diffusers' is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"prediction_type": "eps"}', "model.safetensors: its metadata .* prediction_type='eps' is not known"),
        ('{"prediction_type": ["epsilon"]}', "must be a text"),
        ('{"rescale_betas_zero_snr": "false"}', "must be true or false"),
        ('{"num_train_timesteps": 1000000000}', "must be a whole number from 1 to 100000"),
        ('{"beta_end": NaN}', "beta_end=nan must be a number"),
        ('{"_guidance_rescale": 7}', "guidance_rescale=7 must lie in"),
    ],
)
def test_records_that_cannot_be_read(record, message, write):
    with pytest.raises(ValueError, match=message):
        find_model_facts(write(zsnr_diffusers=record))


@pytest.mark.parametrize("key", ["edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"])
def test_edm_models_are_refused(key, write):
    """CosXL and Playground 2.5, which have the weights of XL otherwise."""
    with pytest.raises(ValueError, match=rf"has the key '{key}': it is of an EDM schedule"):
        find_model_facts(write(keys=[key, "v_pred"]))


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
            find_model_facts(file)
    for config in (tmp_path / "nowhere.yaml", "https://example.org/v2.yaml"):
        with pytest.raises(FileNotFoundError, match=r"no file .*\.yaml; of one at a URL, pass a copy"):
            find_model_facts(write(keys=["v_pred"]), original_config=config)


# Folders


@pytest.mark.parametrize("prediction_type", [V, EPSILON])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_folders_say_it_in_the_scheduler_s_config(prediction_type, zero_snr, tmp_path):
    pipe = tiny_stable_diffusion(sd_scheduler(prediction_type, zero_snr))
    enable_guidance_rescale(pipe, 0.3).save_pretrained(tmp_path)
    facts = find_model_facts(tmp_path)
    assert (facts.prediction_type, facts.rescale_betas_zero_snr) == (prediction_type, zero_snr)
    assert facts.guidance["guidance_rescale"] == 0.3
    assert found(tmp_path, prediction_type="sample", rescale_betas_zero_snr=not zero_snr) == ("sample", not zero_snr)
    given = {"scheduler": EulerDiscreteScheduler(prediction_type="sample")}
    assert found(tmp_path, **given) == ("sample", False)
    assert find_model_facts(tmp_path, **given).conflicts == []


def test_what_a_scheduler_s_config_leaves_out_is_its_class_s_default():
    assert scheduler_claim({"_class_name": "PNDMScheduler"}) == scheduler_claim(PNDMScheduler().config)
    ours = scheduler_claim({"_class_name": "ZeroSNRMultistepScheduler", "prediction_type": V})
    assert ours == scheduler_claim(ZeroSNRMultistepScheduler(prediction_type=V).config)
    assert (ours.prediction_type, ours.rescale_betas_zero_snr) == (V, True)


def test_a_flag_that_the_class_ignores_still_says_it_of_the_model():
    config = HeunDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config).config
    assert scheduler_claim(config).rescale_betas_zero_snr is True


def test_other_models_say_nothing():
    source = "the scheduler's config"
    assert scheduler_claim(FlowMatchEulerDiscreteScheduler().config) == Claim(source)
    assert scheduler_claim({}) == Claim(source)
    assert scheduler_claim({"_class_name": "NoSuchScheduler", "prediction_type": V}) == Claim(source)


# What is no model


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*hf_hub_download\(repo, name\)"):
        find_model_facts(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="holds no pipeline"):
        find_model_facts(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.ckpt is no \.safetensors file\. A pickled checkpoint"):
        find_model_facts(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="prediction_type='eps' is not known"):
        find_model_facts(tmp_path, prediction_type="eps")
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
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged or no safetensors file: "):
        find_model_facts(path)


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
        outcome = find_model_facts(path)
    except ValueError as error:
        outcome = error
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # Python reads no weights, whatever length a header claims; the library maps the file
    if isinstance(outcome, ValueError):
        assert "any.safetensors" in str(outcome)
    else:
        assert all(isinstance(value, str) for value in read_header(path).metadata.values())

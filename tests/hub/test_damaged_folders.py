"""Folders and files that hold anything: loaded, or refused with their name; nothing else comes out or is changed."""

import json
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from audited import files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_checkpoints import checkpoint, tiny_pipeline
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import audit, load_pipeline
from zsnr_diffusers.hub.saved_model import SavedModel

INDEX, CONFIG, WEIGHTS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
READERS = [SavedModel.open, partial(audit, steps=(1, 5)), load_pipeline]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_unconditional().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "damaged")


def outcomes(folder):
    """Of each reader: what it returns, or the error in words that names the folder."""
    before = files(folder)
    for reader in READERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield reader(folder)
        except (OSError, ValueError) as error:
            assert type(error) in (OSError, ValueError, FileNotFoundError), repr(error)  # noqa: PT017
            assert "damaged" in str(error), repr(error)  # noqa: PT017
            yield str(error)
        except TypeError as error:
            assert "DDIMPipeline has no classifier-free guidance" in str(error)  # noqa: PT017
            yield str(error)
        assert files(folder) == before


BOMBS = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 1_000_000,
    "deep, in an object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a whole number of 100,000 digits": b'{"num_train_timesteps": ' + b"9" * 100_000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "NaN": b"NaN",
}


@pytest.mark.parametrize("name", [INDEX, CONFIG])
@pytest.mark.parametrize("bomb", BOMBS)
def test_files_that_are_no_settings_are_named(name, bomb, folder):
    (folder / name).write_bytes(BOMBS[bomb])
    for outcome in outcomes(folder):
        assert name.split("/")[-1] in outcome


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_network_s_config_that_is_none_is_named(bomb, folder):
    (folder / "unet/config.json").write_bytes(BOMBS[bomb])
    _, _, loaded = outcomes(folder)
    assert "config.json" in loaded


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_weights_that_are_cut_off_are_named(cut, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:cut])
    _, _, loaded = outcomes(folder)
    assert "diffusion_pytorch_model.safetensors" in loaded


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    st.sampled_from(["v_prediction", "epsilon", "trailing", "DDIMScheduler", "diffusers", "torch"]),
    st.sampled_from([10**9, 2**70, 1e308]),
    st.lists(st.none() | st.text(max_size=3) | st.floats(0, 1) | st.just("diffusers"), max_size=3),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
GUIDANCE = ["_guidance_rescale", "_guidance_rescale_space"]
SCHEDULE = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"]
FACTS = ["prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "clip_sample_range"]
KEYS = {
    INDEX: ["_class_name", "_diffusers_version", "scheduler", "unet", "x", *GUIDANCE],
    CONFIG: ["_class_name", "x", *SCHEDULE, *FACTS],
    "unet/config.json": ["_class_name", "sample_size", "in_channels", "block_out_channels", "norm_num_groups", "x"],
}


@pytest.mark.full
@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_value_is_taken_or_refused_in_words(data, whole, tmp_path):
    name = data.draw(st.sampled_from(sorted(KEYS)))
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS[name]), VALUES, min_size=1, max_size=2))
    shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    folder = shutil.copytree(whole, tmp_path / "damaged")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    assert len([*outcomes(folder)]) == len(READERS)


# -- single files


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_pipeline("1").save_pretrained(folder)
    return folder


CHANGES = {
    "another shape": lambda key, weights: weights[key].repeat(2, *[1] * (weights[key].ndim - 1)),
    "a scalar": lambda key, weights: torch.tensor(1.0),
    "empty": lambda key, weights: torch.empty(0),
    "whole numbers": lambda key, weights: weights[key].long(),
    "truth values": lambda key, weights: weights[key] > 0,
    "complex": lambda key, weights: weights[key].to(torch.complex64),
}


@pytest.mark.full
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.time_embed.0.bias",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_weights_of_other_kinds_are_refused(change, key, config, tmp_path):
    weights = dict(checkpoint("1"))
    weights[key] = CHANGES[change](key, weights)
    path = tmp_path / "damaged.safetensors"
    save_file(weights, path)
    with pytest.raises((OSError, ValueError), match=r"damaged\.safetensors"):
        load_pipeline(path, config=config)


def test_weights_that_are_missing_are_refused(config, tmp_path):
    weights = dict(checkpoint("1"))
    del weights["model.diffusion_model.time_embed.0.weight"]
    path = tmp_path / "damaged.safetensors"
    save_file(weights, path)
    with pytest.raises((OSError, ValueError), match=r"damaged\.safetensors"):
        load_pipeline(path, config=config)


IN_LITTLE_MEMORY = """
import pathlib, re, resource, struct, sys
from zsnr_diffusers import load_pipeline
from zsnr_diffusers.hub.saved_model import SavedModel
from zsnr_diffusers.hub.header import read_header
import zsnr_diffusers.hub.load
(now,) = re.findall(r"VmData:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
resource.setrlimit(resource.RLIMIT_DATA, (int(now) * 2**10 + 2**26,) * 2)  # a file that is mapped does not count
path = pathlib.Path(sys.argv[1], "bomb.safetensors")
for length, size in ((2**63 - 1, 10), (2**40, 10), (10**9, 2**31), (99_999_999, 99_999_999 + 8), (2**27, 2**28)):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b'{"a":')
        file.truncate(size)
    for reader in (read_header, SavedModel.open, load_pipeline):
        try:
            reader(path)
        except ValueError as error:
            assert "bomb.safetensors" in str(error)
        else:
            raise AssertionError(length)
print("refused")
"""


@pytest.mark.full
def test_headers_of_any_length_are_refused_in_64_mib(tmp_path):
    """Whatever a header claims, in files up to 2 GiB (which have holes)."""
    result = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path], capture_output=True, text=True)
    assert result.stdout.strip() == "refused", result.stderr

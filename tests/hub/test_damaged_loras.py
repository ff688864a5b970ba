"""LoRA files that hold anything: converted, or refused in words; nothing else comes out, is written or is changed."""

import shutil

import pytest
import torch
from audited import files
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import adapted
from tiny_checkpoints import tiny_pipeline

from zsnr_diffusers import audit, load_lora, save_lora
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a base, `base`, and its LoRA, `lora`; files beside them may be changed."""
    room = tmp_path_factory.mktemp("room")
    tiny_pipeline("1").save_pretrained(room / "base")
    save_lora(adapted("1", target_modules=["to_k", "to_v"]), room / "lora")
    return room


def outcome(room, capsys):
    """The exit status of converting `damaged.safetensors`, and what was said of it."""
    before, target = files(room), room / "target"
    status = main(["convert", str(room / "damaged.safetensors"), str(target), "--config", str(room / "base")])
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("zsnr convert: error: ")]
    after = files(room)
    assert {path: content for path, content in after.items() if path.parts[0] != "target"} == before
    shutil.rmtree(target, ignore_errors=True)
    assert status in (0, 2)
    assert len(said) == (status == 2)
    assert (after.keys() == before.keys()) == (status == 2), said
    return status, "".join(said)


def spoil(weights, name, how):
    """Change a tensor of a LoRA in one of the ways that are tried."""
    value = weights[name]
    changed = {
        "gone": None,
        "whole numbers": value.to(torch.int32),
        "transposed": value.t().contiguous() if value.ndim == 2 else value[..., None],
        "empty": value.flatten()[:0],
        "a number": value.flatten()[:1].sum(),
        "five dimensions": value.reshape(1, 1, 1, 1, -1),
        "half": value.half() if value.is_floating_point() else value,
        "float64": value.double(),
        "not finite": torch.full_like(value, float("nan")) if value.is_floating_point() else value,
    }[how]
    rest = {key: tensor for key, tensor in weights.items() if key != name}
    return rest if changed is None else {**rest, name: changed}


HOW = ["gone", "whole numbers", "transposed", "empty", "a number", "five dimensions", "half", "float64", "not finite"]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from([LORA_FILE, KOHYA_FILE]), position=st.integers(0, 10**6), how=st.sampled_from(HOW))
@example(file=LORA_FILE, position=0, how="gone")
@example(file=KOHYA_FILE, position=0, how="whole numbers")
@example(file=KOHYA_FILE, position=1, how="a number")
def test_weights_of_any_kind_are_converted_or_refused(file, position, how, room, capsys):
    weights, metadata = load_file(room / "lora" / file), read_header(room / "lora" / file).metadata
    name = sorted(weights)[position % len(weights)]
    save_file(spoil(weights, name, how), room / "damaged.safetensors", metadata)
    status, said = outcome(room, capsys)
    assert status == 0 or "damaged.safetensors" in said


@pytest.mark.full
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), more=st.binary(max_size=40))
def test_bytes_of_any_kind_are_converted_or_refused(share, more, room, capsys):
    content = (room / "lora" / LORA_FILE).read_bytes()
    (room / "damaged.safetensors").write_bytes(content[: int(share * len(content))] + more)
    status, said = outcome(room, capsys)
    assert status == 0 or "damaged.safetensors" in said
    for reader in (audit, lambda file: load_lora(tiny_pipeline("1"), file)):
        try:
            reader(room / "damaged.safetensors")
        except ValueError as error:
            assert "damaged.safetensors" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "metadata",
    [
        {"zsnr_diffusers": "["},
        {"zsnr_diffusers": "[" * 100_000},
        {"zsnr_diffusers": '{"beta_start": "low"}'},
        {"zsnr_diffusers": '{"prediction_type": 3}'},
        {"zsnr_diffusers": '{"num_train_timesteps": 1000000000}'},
        {"zsnr_diffusers": '{"_guidance_rescale": 7}'},
        {"lora_adapter_metadata": "["},
        {"lora_adapter_metadata": '{"unet.r": "many"}'},
        {"lora_adapter_metadata": '{"unet.lora_alpha": {}, "unet.r": -3}'},
        {"lora_adapter_metadata": '{"unet.target_modules": 3}'},
        {"lora_adapter_metadata": '{"unet.mine": 3}'},
    ],
    ids=lambda metadata: str(metadata)[:50],
)
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_metadata_of_any_kind_are_refused(metadata, room, capsys):
    kept = read_header(room / "lora" / LORA_FILE).metadata
    save_file(load_file(room / "lora" / LORA_FILE), room / "damaged.safetensors", {**kept, **metadata})
    status, said = outcome(room, capsys)
    assert status == 2
    assert "damaged.safetensors" in said

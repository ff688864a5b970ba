"""Pipelines without weights, of configs alone."""

import json
import shutil

import pytest
import torch
from published_models import networks
from tiny_checkpoints import KINDS, settings, tiny_pipeline
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers.hub.empty_pipeline import empty_pipeline


@pytest.fixture
def folder(tmp_path):
    """With configs alone."""
    tiny_pipeline("1").save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").rglob("*.safetensors"):
        file.unlink()
    return tmp_path / "base"


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_layers_of_the_real_one_and_no_weights(kind, tmp_path):
    real = tiny_pipeline(kind)
    real.save_pretrained(tmp_path)
    pipe = empty_pipeline(tmp_path, torch.bfloat16)
    assert type(pipe) is type(real)
    assert settings(pipe.scheduler) == settings(real.scheduler)
    assert networks(pipe).keys() == networks(real).keys()
    for name, network in networks(pipe).items():
        others = getattr(real, name).state_dict()
        assert {key: value.shape for key, value in network.state_dict().items()} == {
            key: value.shape for key, value in others.items()
        }
        for value in network.parameters():
            assert value.dtype == torch.bfloat16
            assert value.untyped_storage().nbytes() == 2  # of one number
            assert not value.any()
            assert not value.requires_grad


def test_configs_are_all_that_it_needs(folder):
    assert type(empty_pipeline(folder).unet).__name__ == "UNet2DConditionModel"


def test_damage_is_named(folder):
    def change(name, **changes):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    shutil.copytree(folder, folder.parent / "kept")
    for name, changes, message in (
        ("model_index.json", {"unet": ["mine", "MyUNet"]}, "which is not a class of a known library"),
        ("model_index.json", {"unet": 3}, "cannot be loaded"),
        (
            "model_index.json",
            {"_class_name": "DDPMPipeline"},
            "which is not a UNet pipeline with",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "Mine"}, "names 'Mine', which is not a known scheduler"),
        ("unet/config.json", {"block_out_channels": "wide"}, "cannot be loaded"),
    ):
        change(name, **changes)
        with pytest.raises(ValueError, match=message) as caught:
            empty_pipeline(folder)
        assert str(folder) in str(caught.value)
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "kept", folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(OSError, match=r"base has no vae.config\.json"):
        empty_pipeline(folder)


def test_other_pipelines_are_refused(tmp_path):
    tiny_unconditional().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a UNet pipeline with LoRA support"):
        empty_pipeline(tmp_path)
    with pytest.raises(OSError, match="has no pipeline"):
        empty_pipeline(tmp_path / "unet")

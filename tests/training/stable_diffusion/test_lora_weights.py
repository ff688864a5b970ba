"""A LoRA that training goes on from: whoever wrote its file, it is the same adapter, and only it is trained."""

import shutil
from pathlib import Path

import pytest
import torch
from cases import thirds
from published_models import RESOLUTION, images_of, lora_opened_by_diffusers, published, published_pipeline
from safetensors.torch import load_file, save_file
from tiny_adapters import add_adapter, needs_text_adapters

from zsnr_diffusers import load_lora, save_lora
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub.lora_files import LORA_FILE
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.parameters import base_state_dict, trainable_parameters
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from landscapes import make_landscapes

    return make_landscapes(tmp_path_factory.mktemp("photos"), count=4, image_size=RESOLUTION)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A LoRA of Stable Diffusion 1.5 of rank 3 and alpha 5, as a folder with files by both kinds of names."""
    return save_lora(_adapted("1.5"), tmp_path_factory.mktemp("lora") / "first")


def _adapted(name, **changes):
    pipe = published_pipeline(name)
    add_adapter(pipe.unet, **changes)
    return pipe


def config(tmp_path, photos, weights, name="1.5", **changes):
    options = {
        "pretrained_model_name_or_path": str(published(name)),
        "train_data_dir": str(photos),
        "output_dir": str(tmp_path / "run"),
        "resolution": RESOLUTION,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "luminance_images": 0,
        "checkpointing_steps": 1,
        "lr_warmup_steps": 0,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "lora_weights": str(weights),
    }
    return TrainingConfig(**{**options, **changes})


def output(unet):
    draw = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 77, 32, generator=draw)
    with torch.no_grad():
        return unet(x_t, 500, text).sample


@pytest.mark.full
@thirds(["written"], ["kohya", "folder", "diffusers"])
def test_the_first_step_starts_from_the_same_network(written, first, photos, tmp_path):
    source = {"folder": first, "diffusers": first / LORA_FILE, "kohya": first / "kohya_lora_weights.safetensors"}
    task = StableDiffusionTask(config(tmp_path, photos, source[written]))
    expected = load_lora(published_pipeline("1.5"), first, prediction_type="epsilon", rescale_betas_zero_snr=False)
    # kohya's file keeps strength and weights apart or together: float32 rounds elsewhere
    torch.testing.assert_close(output(task.unet), output(expected.unet), rtol=0, atol=1e-5)
    assert not torch.equal(output(task.unet), output(published_pipeline("1.5").unet))
    trained = trainable_parameters(task.unet)
    assert trained.keys() == {name for name, _ in task.unet.named_parameters() if ".lora_" in name}
    assert {value.shape[0] for name, value in trained.items() if "lora_A" in name} == {3}


@pytest.mark.full
def test_it_is_trained_shipped_and_resumed(first, photos, tmp_path):
    run = tmp_path / "run"
    train(config(tmp_path, photos, first))
    before, after = load_file(first / LORA_FILE), load_file(run / LORA_FILE)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-000002")
    (tmp_path / "again" / LORA_FILE).unlink()
    train(config(tmp_path, photos, first, output_dir=str(tmp_path / "again"), resume=True))
    again = load_file(tmp_path / "again" / LORA_FILE)
    assert all(torch.equal(again[key], value) for key, value in after.items())
    assert images_of(lora_opened_by_diffusers(run, published("1.5"))).std() > 0
    assert main(["audit", str(run)]) == 0


@pytest.mark.full
def test_the_base_stays_as_it_is(first, photos, tmp_path):
    task = StableDiffusionTask(config(tmp_path, photos, first))
    base = published_pipeline("1.5").unet.state_dict()
    assert all(torch.equal(value, base[key]) for key, value in base_state_dict(task.unet).items())


@pytest.mark.full
def test_a_dora_stays_one(photos, tmp_path):
    lora = save_lora(_adapted("1.5", use_dora=True), tmp_path / "dora")
    train(config(tmp_path, photos, lora, max_train_steps=1))
    assert any("magnitude" in key for key in load_file(tmp_path / "run" / LORA_FILE))
    assert "DoRA" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 4}, {"lora_alpha": 2.0}, {"use_dora": True}, {"lora_target_modules": ["to_q"]}]
)
def test_what_the_file_says_cannot_be_asked_for(first, photos, tmp_path, changes):
    with pytest.raises(ValueError, match=f"--{next(iter(changes))}=.*: --lora_weights already determines this"):
        config(tmp_path, photos, first, **changes)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # peft, of layers that are not there
def test_other_files_are_refused_before_the_start(first, photos, tmp_path):
    def refused(weights, message, **changes):
        with pytest.raises((ValueError, OSError), match=message):
            train(config(tmp_path, photos, weights, **changes))
        assert not Path(tmp_path, "run", "training_config.yaml").exists()

    refused(first, "of its .* layers are in", name="xl")
    refused(tmp_path / "none.safetensors", "No such file: .*none.safetensors")
    save_file({"unet.x": torch.ones(2)}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "has no layers of a LoRA or DoRA")


@pytest.mark.full
@needs_text_adapters
def test_adapters_of_text_encoders_are_refused(photos, tmp_path):
    pipe = _adapted("1.5")
    add_adapter(pipe.text_encoder, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    lora = save_lora(pipe, tmp_path / "both")
    with pytest.raises(ValueError, match="changes text_encoder too, but only the UNet is trained here"):
        StableDiffusionTask(config(tmp_path, photos, lora))

"""The method on one screen trains what it says, and ships a pipeline that samples by itself."""

import json
import math

import minimal_finetune
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from published_models import shallow


def run(image_folder, folder, *options):
    minimal_finetune.main(
        [
            *("--pretrained_model_name_or_path", str(shallow()), "--train_data_dir", str(image_folder)),
            *("--output_dir", str(folder), "--resolution", "64", "--train_batch_size", "2", *options),
        ]
    )


@pytest.mark.full
def test_it_trains_the_unet_alone_and_ships_stock_classes(image_folder, tmp_path):
    run(image_folder, tmp_path / "out", "--max_train_steps", "3", "--learning_rate", "1e-3")
    pipe, base = (StableDiffusionPipeline.from_pretrained(path) for path in (tmp_path / "out", shallow()))
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert type(pipe.scheduler) is EulerDiscreteScheduler
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 999
    for name in ("vae", "text_encoder"):
        before, after = (getattr(one, name).state_dict() for one in (base, pipe))
        assert all(torch.equal(before[key], after[key]) for key in before)
    weights = [one.unet.state_dict() for one in (base, pipe)]
    assert not all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    images = pipe("a dark landscape", height=64, width=64, num_inference_steps=2, output_type="pt").images
    assert bool(images.isfinite().all())


def test_a_network_is_shown_pure_noise_and_pays_for_v(image_folder, tmp_path, monkeypatch):
    """At the last timestep the input is the noise itself, and a network that says 0 pays E[x_0^2] there."""
    seen = {}
    monkeypatch.setattr(torch, "randint", lambda high, size, device=None: torch.full(size, high - 1))
    target = minimal_finetune.training_target

    def note(kind, x_0, noise, level):
        seen.update(x_0=x_0, noise=noise, level=level, target=target(kind, x_0, noise, level))
        return seen["target"]

    add = minimal_finetune.add_noise
    monkeypatch.setattr(minimal_finetune, "training_target", note)
    monkeypatch.setattr(minimal_finetune, "add_noise", lambda *args: seen.setdefault("input", add(*args)))
    run(image_folder, tmp_path / "out", "--max_train_steps", "1")
    assert torch.equal(seen["input"], seen["noise"])
    assert torch.equal(seen["target"], -seen["x_0"])
    assert math.isclose(float(seen["level"].alpha.abs().max()), 0.0)


def test_more_images_than_there_are_cannot_be_a_batch(image_folder, tmp_path):
    with pytest.raises(SystemExit, match="--train_batch_size=64 is more than the 10 images"):
        run(image_folder, tmp_path / "out", "--train_batch_size", "64")

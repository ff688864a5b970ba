"""Data that are encoded beforehand: the same run as on the images, without what encodes them."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from child_processes import exit_code, start_ranks
from tar_shards import captioned, write_shards
from training_runs import logged, same, trained, weights

from zsnr_diffusers import training
from zsnr_diffusers.cli import main
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints
from zsnr_diffusers.training.data import dataset
from zsnr_diffusers.training.stable_diffusion import row_cache
from zsnr_diffusers.training.stable_diffusion.config import EncodingConfig
from zsnr_diffusers.training.stable_diffusion.encode import encode
from zsnr_diffusers.training.stable_diffusion.encoders import Autoencoder, TextEncoder

SHARED = {"random_flip": True}


@pytest.fixture
def own(options, shapes_folder, tmp_path):
    """A run on images of many shapes that may be removed."""
    shutil.copytree(shapes_folder, tmp_path / "data")
    changes = {"train_data_dir": str(tmp_path / "data"), "aspect_ratio_buckets": True, "resolution": 64}
    return {**options, **SHARED, **changes, "caption_dropout": 0.4, "report_to": "tensorboard", "max_train_steps": 5}


def encoding(own, tmp_path, **changes):
    """The configuration that encodes a run's data into `encoded`."""
    folder = str(tmp_path / "encoded")
    changes = {"output_dir": folder, "cache_dir": folder, "cache": "both", **changes}
    names = {field.name for field in dataclasses.fields(EncodingConfig)}
    return EncodingConfig(**{name: value for name, value in {**own, **changes}.items() if name in names})


@pytest.fixture
def encoded(own, tmp_path):
    """The run on what was encoded, of which the images are gone."""
    encode(encoding(own, tmp_path))
    own["images"] = str(tmp_path / "images")
    shutil.move(own["train_data_dir"], own.pop("images"))
    return {**own, "train_data_dir": str(tmp_path / "encoded"), "output_dir": str(tmp_path / "from_encoded")}


def on_images(own, tmp_path, **changes):
    """The run on the images, with what is computed of them cached."""
    folder = {"train_data_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "from_images")}
    return TrainingConfig(**{**own, **folder, "cache": "both", **changes})


def test_the_run_is_that_on_the_images_bit_for_bit(encoded, own, tmp_path, monkeypatch):
    own["validation_rows"] = encoded["validation_rows"] = 2
    expected = trained(on_images(own, tmp_path))
    losses, validation = (logged(tmp_path / "from_images")[name] for name in ("loss", "validation_loss"))

    def refuse(self, inputs):
        raise AssertionError("nothing is encoded")

    monkeypatch.setattr(Autoencoder, "__call__", refuse)
    monkeypatch.setattr(TextEncoder, "__call__", refuse)
    monkeypatch.setattr(dataset, "load_rgb", refuse)
    assert same(trained(TrainingConfig(**encoded)), expected)
    assert logged(encoded["output_dir"])["loss"] == losses
    assert logged(encoded["output_dir"])["validation_loss"] == validation


def test_previews_have_their_networks_and_training_has_none(encoded, own, tmp_path, monkeypatch):
    from zsnr_diffusers.training import trainer

    devices = []
    step = trainer.Trainer.train_step

    def spy(self, batches):
        pipe = self.task.base.pipeline
        devices.extend({value.device.type for part in (pipe.vae, pipe.text_encoder) for value in part.parameters()})
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", spy)
    changes = {"luminance_images": 2, "validation_prompts": ["snow"], "validation_steps": 2, "max_train_steps": 3}
    train(TrainingConfig(**{**encoded, **changes}))
    assert devices == ["meta"] * 3
    train(on_images(own, tmp_path, **changes))
    for file in ("previews/step-000000.png", "previews/step-000003.png", "luminance.json"):
        assert (tmp_path / "from_encoded" / file).read_bytes() == (tmp_path / "from_images" / file).read_bytes()


@pytest.mark.full
def test_a_resumed_run_is_the_uninterrupted_one(encoded, tmp_path):
    whole = trained(TrainingConfig(**{**encoded, "output_dir": str(tmp_path / "whole")}))
    trained(TrainingConfig(**{**encoded, "max_train_steps": 2}))
    assert len(list_checkpoints(Path(encoded["output_dir"]))) == 1
    assert same(trained(TrainingConfig(**{**encoded, "resume": True})), whole)


def encode_in_place_of_training():
    """What a child process runs is `encode` from here on."""
    training.main = lambda argv: encode(training.parse_config(argv))


@pytest.mark.full
def test_how_many_processes_encode_and_train_does_not_matter(own, encoded, tmp_path):
    """Sums over a batch in another order: float32 keeps seven digits."""
    alone = trained(TrainingConfig(**{**encoded, "train_batch_size": 4}))
    own |= {"train_data_dir": str(tmp_path / "images")}
    together = {**encoded, "train_batch_size": 2, "train_data_dir": str(tmp_path / "encoded-2")}
    folder = together["train_data_dir"]
    options = {**own, "output_dir": folder, "cache_dir": folder, "cache": "both", "report_to": "none"}
    ranks = start_ranks(options, tmp_path, prepare=encode_in_place_of_training)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank1.log").read_text()
    ranks = start_ranks({**together, "output_dir": str(tmp_path / "together")}, tmp_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank1.log").read_text()
    found = weights(tmp_path / "together")
    assert all((found[name] - value).abs().max() < 1e-5 for name, value in alone.items())


def test_a_killed_encoding_goes_on(own, tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 1)
    computed = []
    call = Autoencoder.__call__

    def killed(self, inputs):
        computed.append(len(inputs))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return call(self, inputs)

    monkeypatch.setattr(Autoencoder, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(encoding(own, tmp_path))
    assert not (tmp_path / "encoded" / "encoded.json").exists()
    encode(encoding(own, tmp_path))
    again = len(computed)
    assert again > 3
    encode(encoding(own, tmp_path))
    assert len(computed) == again  # all was there
    fresh = tmp_path / "fresh"
    encode(encoding(own, tmp_path, output_dir=str(fresh), cache_dir=str(fresh)))
    assert len(computed) - again == again - 1  # but for the batch that was interrupted, all was computed once


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resolution": 128}, r"lacks 10 latents .*Differences: --resolution, 64 there and 128 here\."),
        ({"aspect_ratio_buckets": False}, r"Differences: --aspect_ratio_buckets, True there and False here\."),
        ({"mixed_precision": "bf16"}, r"Differences: dtype of latents; dtype of text\."),
        ({"random_crop": True}, r"--random_crop: .*contains precomputed latents and text embeddings"),
        ({"cache": "none"}, r"--cache=none: .*contains precomputed latents"),
    ],
)
def test_other_sizes_and_precisions_are_refused(encoded, changes, said):
    AcceleratorState._reset_state(True)  # another precision is one of a process of its own
    with pytest.raises(ValueError, match=said):
        train(TrainingConfig(**{**encoded, **changes}))


def test_another_base_is_refused(encoded, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(encoded["pretrained_model_name_or_path"], tmp_path / "base")
    (file,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Differences: weights of latents\."):
        train(TrainingConfig(**{**encoded, "pretrained_model_name_or_path": str(base)}))


@pytest.mark.parametrize("damage", ["rows.parquet", "encoded.json"])
def test_a_damaged_table_is_refused(encoded, damage):
    path = Path(encoded["train_data_dir"], damage)
    path.write_bytes(path.read_bytes()[:-2] + b" }")
    if damage == "encoded.json":
        path.write_text("{}")
    with pytest.raises(ValueError, match="encode the data again"):
        train(TrainingConfig(**encoded))


@pytest.mark.full
def test_xl_and_its_sizes(xl_options, tmp_path):
    """Original sizes and crops are conditions there; the second text encoder's pooled output is stored too."""
    changes = {"aspect_ratio_buckets": True, "random_flip": True, "train_batch_size": 3, "max_train_steps": 3}
    own = {**xl_options, **changes}
    encode(encoding(own, tmp_path))
    expected = trained(TrainingConfig(**{**own, "cache": "both"}))
    found = {**own, "train_data_dir": str(tmp_path / "encoded"), "output_dir": str(tmp_path / "from_encoded")}
    assert same(trained(TrainingConfig(**found)), expected)


@pytest.mark.full
def test_the_command_on_tars_gives_what_it_gives_on_the_folder(options, image_folder, tmp_path, capsys):
    pattern = write_shards(tmp_path / "shards", captioned(image_folder))
    base, found = options["pretrained_model_name_or_path"], []
    for name, source in (("a", ("--train_shards", pattern)), ("b", ("--train_data_dir", str(image_folder)))):
        out = str(tmp_path / name)
        assert main(["encode", base, *source, "--output_dir", out, "--dataloader_num_workers", "0"]) == 0
        assert "Encoded 10 images" in capsys.readouterr().out
        changes = {"train_data_dir": out, "output_dir": str(tmp_path / f"run-{name}")}
        found.append(trained(TrainingConfig(**{**options, **changes})))
    assert same(*found)
    assert main(["encode", base, "--train_data_dir", str(tmp_path), "--output_dir", options["output_dir"]]) == 2


def test_how_accelerate_would_shard_a_network_does_not_matter(own, tmp_path, monkeypatch):
    """Here by FSDP1, which a run refuses; accelerate itself would need a GPU for it."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_SYNC_MODULE_STATES"):
        monkeypatch.setenv(name, "true")
    encode(encoding(own, tmp_path))
    assert (tmp_path / "encoded" / "encoded.json").exists()

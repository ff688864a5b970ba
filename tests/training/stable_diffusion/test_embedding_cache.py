from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from embedding_caches import (
    N_TEXTS,
    caption_all,
    captions,
    change_caption,
    change_image,
    inputs_of_unet,
    prepare,
    shards,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, create_dataloader
from zsnr_diffusers.training.stable_diffusion import row_cache
from zsnr_diffusers.utils.hashing import file_sha256

LONG = "a black landscape " * 20


# -- the same numbers


@pytest.mark.full
@pytest.mark.parametrize("captions", ["single", "lists"])
@pytest.mark.parametrize("choice", ["both", "latents", "text"])
def test_what_is_stored_equals_what_is_computed(own, choice, captions, computed):
    """Kernels for batches of other sizes round otherwise: 1e-6 of values around 1."""
    texts = ["snow", "", None, LONG, "a cat", "snow", "SNOW", "ünknown ☃", "a  cat", "a"]
    if captions == "lists":
        texts = [[one or "", "a white landscape"] for one in texts]
        texts[3] = []
    caption_all(own["train_data_dir"], texts)
    own |= {"caption_dropout": 0.3, "random_flip": True}
    online = inputs_of_unet(prepare(own, cache="none"), range(0, 60, 2))
    assert not computed
    stored = prepare(own, cache=choice)
    encode = {"latents": stored.task.autoencoder, "text": stored.task.text_encoder}
    for name in stored.samples.caches:
        encode[name].network = None  # from here on nothing is computed
    for a, b in zip(inputs_of_unet(stored, range(0, 60, 2)), online, strict=True):
        assert (a - b).abs().max() < 1e-6 * max(1, b.abs().max())
    assert computed.keys() == ({"latents", "text"} if choice == "both" else {choice})
    assert computed["latents"] == (0 if choice == "text" else 20)


def losses(folder):
    events = EventAccumulator(str(Path(folder) / "logs")).Reload()
    return [event.value for event in events.Scalars("loss")]


def test_a_run_with_caches_has_the_losses_of_one_without(options, tmp_path):
    options |= {"report_to": "tensorboard", "random_flip": True, "max_train_steps": 6}
    for choice in ("none", "both"):
        train(TrainingConfig(**{**options, "cache": choice, "output_dir": str(tmp_path / choice)}))
    assert shards(tmp_path / "both" / "cache")
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


@pytest.mark.full
def test_half_precision_is_stored_as_such(options):
    """bfloat16 keeps 8 bits; what it computes depends on the batch's size within that."""
    online = inputs_of_unet(prepare(options, mixed_precision="bf16", cache="none"), range(4))
    stored = prepare(options, mixed_precision="bf16")
    assert {values.dtype for values in stored.samples[0].values() if values.ndim == 3} == {
        torch.float32,
        torch.bfloat16,
    }
    for a, b in zip(inputs_of_unet(stored, range(4)), online, strict=True):
        assert (a - b).abs().max() < 2**-6 * b.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same(options, workers, monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 1000)
    config = TrainingConfig(**{**options, "dataloader_num_workers": workers, "max_train_steps": 8})
    samples = prepare(options, dataloader_num_workers=workers, max_train_steps=8).samples
    assert len(shards(options["output_dir"])) > 2
    for step, batch in enumerate(create_dataloader(samples, DistributedBatchSampler(config, range(8), 0, 1), config)):
        expected = default_collate([samples[2 * step], samples[2 * step + 1]])
        assert batch.keys() == expected.keys() >= {"mean", "std", "text"}
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


# -- what is computed again


def test_nothing_is_computed_twice(own, computed):
    prepare(own)
    assert computed == {"latents": 10, "text": len({*captions(own["train_data_dir"]), ""})}
    computed.clear()
    prepare(own, output_dir=own["output_dir"] + "2", seed=7, learning_rate=1.0)
    assert not computed


def test_equal_images_and_captions_are_stored_once(own, computed):
    for path in Path(own["train_data_dir"]).glob("*.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    caption_all(own["train_data_dir"], ["snow"] * 10)
    prepare(own)
    assert computed == {"latents": 1, "text": 2}


def test_only_what_the_run_will_show_is_stored(own, computed):
    few = prepare(own, max_train_steps=2)
    assert computed["latents"] == 4
    inputs_of_unet(few, [0, 2])


def rename_image(own):
    data = Path(own["train_data_dir"])
    (data / "00003.png").rename(data / "zzz.png")
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace("00003.png", "zzz.png"))
    return {}


def change_base(change):
    def changed(own):
        pipe = StableDiffusionPipeline.from_pretrained(own["pretrained_model_name_or_path"], safety_checker=None)
        change(pipe)
        pipe.save_pretrained(own["pretrained_model_name_or_path"])
        return {}

    return changed


def nudge(parameters):
    with torch.no_grad():
        list(parameters)[3].view(-1)[0] += 1e-3


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "latents", "text"),
    [
        (change_image, 1, 0),
        (rename_image, 0, 0),
        (change_caption, 0, 1),
        (change_base(lambda pipe: nudge(pipe.vae.parameters())), 10, 0),
        (change_base(lambda pipe: nudge(pipe.text_encoder.parameters())), 0, N_TEXTS),
        (change_base(lambda pipe: nudge(pipe.unet.parameters())), 0, 0),
        (change_base(lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5)), 0, 0),
        (change_base(lambda pipe: pipe.vae.register_to_config(act_fn="gelu")), 10, 0),
        (lambda own: {"resolution": 128}, 10, 0),
        (lambda own: {"random_flip": True}, 10, 0),
        (lambda own: {"mixed_precision": "bf16"}, 10, N_TEXTS),
        (lambda own: {"caption_dropout": 1.0, "prediction_type": "sample"}, 0, 0),
    ],
    ids=[
        "image",
        "name",
        "caption",
        "vae",
        "text_encoder",
        "unet",
        "scaling",
        "act_fn",
        "size",
        "flip",
        "dtype",
        "run",
    ],
)
def test_exactly_what_has_changed_is_computed_anew(own, computed, change, latents, text):
    prepare(own)
    stored = shards(own["cache_dir"])
    changes = change(own)
    computed.clear()
    after = prepare(own, **changes)
    assert (computed["latents"], computed["text"]) == (latents, text)
    assert set(stored) <= set(shards(own["cache_dir"]))
    if not changes.get("mixed_precision"):
        online = inputs_of_unet(prepare(own, **changes, cache="none"), range(0, 10, 2))
        for a, b in zip(inputs_of_unet(after, range(0, 10, 2)), online, strict=True):
            assert (a - b).abs().max() < 1e-6 * max(1, b.abs().max())


@pytest.mark.full
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_shards_are_computed_anew_and_no_others(own, computed, monkeypatch, damage):
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 1)  # a shard per batch: eight images and two
    before = prepare(own)
    expected = inputs_of_unet(before, range(0, 10, 2))
    for name, per_shard in (("latents", {8, 2}), ("text", {N_TEXTS})):
        (folder,) = Path(own["cache_dir"]).glob(f"{name}-*")
        shard = shards(folder)[0]
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.unlink()
        if damage != "gone":
            shard.write_bytes(data if damage == "flip" else data[:-7])
        computed.clear()
        after = prepare(own)
        assert computed[name] in per_shard
        assert computed.total() == computed[name]
        assert all(torch.equal(a, b) for a, b in zip(inputs_of_unet(after, range(0, 10, 2)), expected, strict=True))
        assert all(file_sha256(shard) == shard.stem for shard in shards(own["cache_dir"]))


@pytest.mark.full
def test_results_do_not_depend_on_their_company(own, tmp_path):
    """A batch of one rounds otherwise than one of eight, so batches are filled up."""
    whole = prepare(own)
    own["cache_dir"] = str(tmp_path / "piecewise")
    for steps in range(1, 10):
        prepare(own, train_batch_size=1, max_train_steps=steps)
    a, b = (inputs_of_unet(one, range(0, 10, 2)) for one in (whole, prepare(own)))
    assert len(shards(own["cache_dir"])) > 9
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.full
def test_resume_is_bitwise_the_uninterrupted_run_also_after_a_loss(options, tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 1)
    options |= {"cache_dir": str(tmp_path / "cache"), "random_flip": True}

    def weights(**changes):
        train(TrainingConfig(**{**options, **changes}))
        return load_file(Path(changes["output_dir"]) / "unet" / "diffusion_pytorch_model.safetensors")

    whole = weights(output_dir=str(tmp_path / "whole"))
    weights(output_dir=str(tmp_path / "parts"), max_train_steps=2)
    for shard in shards(options["cache_dir"])[::2]:
        shard.unlink()
    resumed = weights(output_dir=str(tmp_path / "parts"), resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

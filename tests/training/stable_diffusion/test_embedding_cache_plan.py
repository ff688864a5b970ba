"""What a run says and decides about storing latents and text states, and where encoders are meanwhile."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from embedding_caches import N_TEXTS, Prepared, captions, change_caption, change_image, inputs_of_unet, prepare, shards
from training_runs import output_of, shown

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask, embedding_cache
from zsnr_diffusers.utils.distributed import Processes


def dry_run(options, capsys, **changes):
    train(TrainingConfig(**{**options, **changes, "dry_run": True}))
    return capsys.readouterr().out


def test_dry_run_counts_and_writes_nothing(own, capsys):
    text = dry_run(own, capsys)
    # 2 x 4 x 8 x 8 float32 of an image, 77 x 32 of a caption
    assert "cached latents: 10 of 2.05 kB each: 0 stored, 10 to compute (20.5 kB), in " in text
    assert f"cached text: {N_TEXTS} of 9.86 kB each: 0 stored, {N_TEXTS} to compute (69 kB), in " in text
    assert not Path(own["cache_dir"]).exists()
    prepare(own)
    change_image(own)
    change_caption(own)
    shard = shards(next(Path(own["cache_dir"]).glob("text-*")))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    text = dry_run(own, capsys)
    assert "cached latents: 10 of 2.05 kB each: 9 stored, 1 to compute (2.05 kB), in " in text
    texts = len({*captions(own["train_data_dir"]), ""})
    assert f"cached text: {texts} of 9.86 kB each: 0 stored, 1 files damaged, {texts} to compute" in text
    assert shard.exists()
    assert "cached" not in dry_run(own, capsys, cache="none")
    assert "cached latents" not in dry_run(own, capsys, cache="text")
    assert not Path(own["output_dir"]).exists()


@pytest.mark.full
@pytest.mark.parametrize(("free", "stored"), [(200_000, {"latents", "text"}), (60_000, {"latents"}), (8_000, set())])
def test_auto_stores_what_fits_and_says_so(own, monkeypatch, free, stored, capsys):
    """20,480 bytes of latents and 68,992 of text in half of what is free."""
    monkeypatch.setattr(embedding_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    text = dry_run(own, capsys)
    for name in ("latents", "text"):
        assert (f"cached {name}: no: " in text) == (name not in stored)
    task, samples = prepare(own)
    assert samples.caches.keys() == stored
    inputs_of_unet(Prepared(task, samples), [0])


def test_what_is_asked_for_and_does_not_fit_is_an_error(own, monkeypatch):
    monkeypatch.setattr(embedding_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000))
    with pytest.raises(ValueError, match=r"--cache=both needs 89.5 kB in .* 60 kB are free: use a --cache_dir"):
        prepare(own, cache="both")
    assert prepare(own, cache="latents").samples.caches.keys() == {"latents"}


@pytest.mark.full
def test_measuring_stores_nothing_where_it_stays(own, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # a run of one step shows two images, the measurement of its speed all of them
    train(TrainingConfig(**{**own, "dry_run": True, "measure": True, "max_train_steps": 1}))
    text = capsys.readouterr().out
    assert "measured: computing the missing cache would take 0.0 hours" in text
    assert "images/s" in text
    assert not Path(own["cache_dir"]).exists()
    assert not Path(own["output_dir"]).exists()


# -- the device


@pytest.mark.full
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("choice", ["none", "latents", "text", "both"])
def test_frozen_parts_are_on_the_device_only_when_they_are_needed(own, choice, filled, monkeypatch):
    """Moves are written down in place of made: `meta` stands for a GPU."""
    own |= {"cache": choice, "validation_prompts": ["snow"], "num_inference_steps": 1}
    if filled:
        prepare(own)
    task = StableDiffusionTask(TrainingConfig(**own))
    samples = task.samples(check_images(task.rows, task.config))
    moves = {}
    for part in task.embedding_cache.parts:
        moves[part.name] = ["cpu"]
        monkeypatch.setattr(part.network, "to", lambda place, *_, made=moves[part.name], **__: made.append(str(place)))

    def places():
        return {name: made[-1] for name, made in moves.items()}

    accelerator = Accelerator(cpu=True)
    task.plan_cache(accelerator, Processes(), samples, shown(task.config))
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    task.prepare(accelerator, Processes(), samples)
    stored = {"none": set(), "both": {"latents", "text"}}.get(choice, {choice})
    training = {name: "cpu" if name in stored else "meta" for name in moves}
    assert places() == training
    for name in stored:
        assert ("meta" in moves[name]) == (not filled)

    seen, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **kw: seen.append(places()) or decode(*args, **kw))
    output = output_of(task)
    output.validation_images(output.pipeline(task.unet))
    assert seen == [{"latents": "meta", "text": "meta"}]
    assert places() == training
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.validation_images(output.pipeline(task.unet))
    assert places() == training


def test_previews_are_the_same_with_caches(own):
    own |= {"validation_prompts": ["snow"], "num_inference_steps": 2}
    tasks = [prepare(own, cache=choice).task for choice in ("both", "none")]
    outputs = map(output_of, tasks)
    (with_caches, _), (without, _) = (one.validation_images(one.pipeline(one.base.pipeline.unet)) for one in outputs)
    assert [image.tobytes() for row in with_caches for image in row] == [
        image.tobytes() for row in without for image in row
    ]

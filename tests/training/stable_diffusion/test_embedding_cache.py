import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from child_processes import exit_code, start_ranks
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training import accelerator as accelerator_module
from zsnr_diffusers.training.data import dataset
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, create_dataloader
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask, embedding_cache, encoders, row_cache
from zsnr_diffusers.utils.distributed import Processes
from zsnr_diffusers.utils.hashing import file_sha256

Prepared = namedtuple("Prepared", "task samples")
CPU = torch.device("cpu")
LONG = "a black landscape " * 20


def prepare(options, **changes):
    """A task whose caches are filled, and its samples."""
    config = TrainingConfig(**{**options, **changes})
    AcceleratorState._reset_state(True)  # of another precision
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision or "no")
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config))
    task.plan_cache(accelerator, Processes(), samples)
    return Prepared(task, task.prepare(accelerator, Processes(), samples))


def inputs_of_unet(prepared, positions):
    """x_0 [n, 4, 4, 4] and text states [n, 16, 8] of samples, batch after batch."""
    task, samples = prepared
    seen = []
    for position in positions:
        batch = default_collate([samples[position], samples[position + 1]])
        x_0 = task.x_0(batch)
        task.predict(lambda x, t, text, return_dict, x_0=x_0: seen.append((x_0, text)) or (x,), x_0, batch)
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def shards(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


@pytest.fixture
def computed(monkeypatch):
    """How many images and captions were computed to be stored since the last `clear`."""
    count = Counter()
    for part in (encoders.Autoencoder, encoders.TextEncoder):

        def load(samples, known, part=part, load=part.load):
            count[part.name] += 1
            return load(samples, known)

        monkeypatch.setattr(part, "load", staticmethod(load))
    return count


@pytest.fixture
def own(options, image_folder, base_folder, tmp_path):
    """Options with data and base of the test's own, and a cache for all that is in them, apart from output_dir."""
    data, base = tmp_path / "data", tmp_path / "base"
    shutil.copytree(image_folder, data)
    shutil.copytree(base_folder, base)
    changes = {"train_data_dir": str(data), "pretrained_model_name_or_path": str(base), "max_train_steps": 20}
    return {**options, **changes, "cache_dir": str(tmp_path / "cache")}


def captions(folder):
    return [json.loads(line)["text"] for line in (Path(folder) / "metadata.jsonl").read_text().splitlines()]


def caption_all(folder, texts):
    names = sorted(path.name for path in Path(folder).glob("*.png"))
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (Path(folder) / "metadata.jsonl").write_text("\n".join(lines) + "\n")


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


def change_image(own):
    Image.new("RGB", (16, 16), "red").save(Path(own["train_data_dir"]) / "00003.png")
    return {}


def rename_image(own):
    data = Path(own["train_data_dir"])
    (data / "00003.png").rename(data / "zzz.png")
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace("00003.png", "zzz.png"))
    return {}


def change_caption(own):
    caption_all(own["train_data_dir"], ["a cat", *captions(own["train_data_dir"])[1:]])
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


N_TEXTS = 7
"""Six captions and the empty one."""


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


# -- several processes, and killed ones

SLOW_STORING = """
import sys, time
from diffusers import AutoencoderKL
from zsnr_diffusers.training.stable_diffusion import row_cache
from zsnr_diffusers.training import main
row_cache.SHARD_BYTES = 1
encode = AutoencoderKL.encode
def slow(self, x):
    time.sleep(0.3)
    return encode(self, x)
AutoencoderKL.encode = slow
main(sys.argv[1:])
"""


def command(options):
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.full
def test_killed_while_storing_keeps_what_is_finished(own, computed, image_folder):
    data = Path(own["train_data_dir"])
    for i in range(10, 40):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(data / f"{i:05d}.png")
    caption_all(data, ["snow"] * 40)
    process = subprocess.Popen([sys.executable, "-c", SLOW_STORING, *command(own)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(shards(own["cache_dir"])) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(shards(own["cache_dir"]))
    assert 2 <= finished < 5
    assert all(file_sha256(shard) == shard.stem for shard in shards(own["cache_dir"]))
    prepare(own)
    assert computed == {"latents": 40 - 8 * finished, "text": 2}


@pytest.mark.full
def test_runs_share_a_cache_at_the_same_time(own, computed, tmp_path):
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SLOW_STORING,
                *command({**own, "max_train_steps": 5, "output_dir": tmp_path / name}),
            ],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for name in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    a, b = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(file_sha256(shard) == shard.stem for shard in shards(own["cache_dir"]))
    prepare(own, max_train_steps=5)
    assert not computed


def test_each_process_stores_a_share(own, computed):
    """Two ranks one after the other, so that the first does not find the other's share when it looks for it."""
    own["cache"] = "latents"
    task = StableDiffusionTask(TrainingConfig(**own))
    samples = task.samples(check_images(task.rows, task.config))
    accelerator, ranks = Accelerator(cpu=True), [Processes(), Processes()]
    task.plan_cache(accelerator, ranks[0], samples)
    for rank, processes in enumerate(ranks):
        processes.rank, processes.size = rank, 2
    with pytest.raises(ValueError, match=r"5 of 10 .*name a --cache_dir that all processes share"):
        task.embedding_cache.populate(accelerator, ranks[1], samples)
    assert computed == {"latents": 5}
    task.embedding_cache.populate(accelerator, ranks[0], samples)
    assert computed == {"latents": 10}
    inputs_of_unet(Prepared(task, samples), range(0, 10, 2))


def hash_slowly():
    """Images take longer to hash than a process waits within a step."""
    accelerator_module.TIMEOUT = timedelta(seconds=2)
    original = dataset.image_sha256

    def slow(*args):
        time.sleep(0.5)
        return original(*args)

    dataset.image_sha256 = slow
    dataset.ThreadPoolExecutor = lambda: ThreadPoolExecutor(1)


@pytest.mark.full
def test_others_wait_for_the_process_that_hashes_as_long_as_it_takes(own, tmp_path):
    own = {**own, "max_train_steps": 1, "train_batch_size": 5}
    ranks = start_ranks(own, tmp_path, prepare=hash_slowly)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank1.log").read_text()


# -- what is said and chosen


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
    with pytest.raises(ValueError, match=r"--cache=both needs 89.5 kB in .* 60 kB are free: name a --cache_dir"):
        prepare(own, cache="both")
    assert prepare(own, cache="latents").samples.caches.keys() == {"latents"}


@pytest.mark.full
def test_measuring_stores_nothing_where_it_stays(own, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # a run of one step shows two images, the measurement of its speed all of them
    train(TrainingConfig(**{**own, "dry_run": True, "measure": True, "max_train_steps": 1}))
    text = capsys.readouterr().out
    assert "measured: storing what is missing would take 0.0 hours" in text
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
        monkeypatch.setattr(part.network, "to", lambda place, *_, made=moves[part.name]: made.append(str(place)))

    def places():
        return {name: made[-1] for name, made in moves.items()}

    accelerator = Accelerator(cpu=True)
    task.plan_cache(accelerator, Processes(), samples)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    task.prepare(accelerator, Processes(), samples)
    stored = {"none": set(), "both": {"latents", "text"}}.get(choice, {choice})
    training = {name: "cpu" if name in stored else "meta" for name in moves}
    assert places() == training
    for name in stored:
        assert ("meta" in moves[name]) == (not filled)

    seen, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **kw: seen.append(places()) or decode(*args, **kw))
    task.output.validation_images(task.output.pipeline(task.unet))
    assert seen == [{"latents": "meta", "text": "meta"}]
    assert places() == training
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.output.validation_images(task.output.pipeline(task.unet))
    assert places() == training


def test_previews_are_the_same_with_caches(own):
    own |= {"validation_prompts": ["snow"], "num_inference_steps": 2}
    tasks = [prepare(own, cache=choice).task for choice in ("both", "none")]
    (with_caches, _), (without, _) = (task.output.validation_images(task.output.pipeline(task.unet)) for task in tasks)
    assert [image.tobytes() for row in with_caches for image in row] == [
        image.tobytes() for row in without for image in row
    ]

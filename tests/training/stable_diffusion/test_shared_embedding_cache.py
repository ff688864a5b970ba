"""Latents and text states stored by several processes, some of which are killed."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from child_processes import exit_code, start_ranks
from diffusers import AutoencoderKL
from embedding_caches import (
    Prepared,
    caption_all,
    inputs_of_unet,
    prepare,
    shards,
)
from PIL import Image
from safetensors.torch import load_file
from training_runs import shown

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training import accelerator as accelerator_module
from zsnr_diffusers.training.data import dataset
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.utils.distributed import Processes
from zsnr_diffusers.utils.hashing import file_sha256

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
    task.plan_cache(accelerator, ranks[0], samples, shown(task.config))
    for rank, processes in enumerate(ranks):
        processes.rank, processes.size = rank, 2
    with pytest.raises(ValueError, match=r"5 of 10 .*use a --cache_dir that all processes share"):
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


def encode_slowly():
    """One process computes latents for longer than others wait within a step."""
    hash_slowly()
    encode = AutoencoderKL.encode

    def slow(*args):
        time.sleep(4 if os.environ["RANK"] == "1" else 0)
        return encode(*args)

    AutoencoderKL.encode = slow


@pytest.mark.full
@pytest.mark.parametrize("prepare", [hash_slowly, encode_slowly])
@pytest.mark.parametrize("count", [2, 4])
def test_others_wait_for_a_process_that_hashes_or_encodes_as_long_as_it_takes(own, tmp_path, count, prepare):
    own = {**own, "max_train_steps": 1, "train_batch_size": 2}
    ranks = start_ranks(own, tmp_path, prepare, count)
    assert [exit_code(rank) for rank in ranks] == [0] * count, (tmp_path / "rank1.log").read_text()

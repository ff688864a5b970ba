from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.training.pixels import PixelTask
from zsnr_diffusers.training.pixels import samples as module

ROWS = range(12)


def drawn(options, count, **changes):
    task = PixelTask(PixelTrainingConfig(**{**options, **changes}))
    samples = task.samples(ROWS)
    return [samples[position] for position in range(count)]


def test_draws_are_what_they_are_said_to_be(options):
    samples = drawn(options, 2000, class_dropout=0.25, random_flip=True)
    timesteps = torch.stack([one["timestep"] for one in samples]).float()
    assert timesteps.min() < 10
    assert timesteps.max() >= 990
    assert timesteps.mean().item() == pytest.approx(499.5, abs=4 * 289 / 2000**0.5)
    noise = torch.stack([one["noise"] for one in samples])
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    counts = Counter(int(one["class_labels"]) for one in samples)
    assert set(counts) == {0, 1, 2, 3}  # 3 stands for no class
    assert counts[3] / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert len({one["pixel_values"].numpy().tobytes() for one in samples}) == 24  # twelve and their mirror images


def test_pixels_are_the_file_s_and_the_class_is_the_folder_s(options, class_folder):
    files = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(): path.parent.name
        for path in class_folder.rglob("*.png")
    }
    for one in drawn(options, 24, class_dropout=0.0):
        pixels = ((one["pixel_values"] + 1) * 127.5).round().byte()
        assert files[pixels.numpy().tobytes()] == ("cat", "dog", "owl")[one["class_labels"]]


def test_what_is_remembered_is_what_was_read(options, monkeypatch):
    reads = []
    read = module.read_image
    monkeypatch.setattr(module, "read_image", lambda *args: reads.append(1) or read(*args))
    remembered = drawn(options, 36)
    assert len(reads) == 12
    monkeypatch.setattr(module, "_MOST_BYTES", 0)
    anew = drawn(options, 36)
    assert len(reads) == 12 + 36
    assert all(torch.equal(a[key], b[key]) for a, b in zip(remembered, anew, strict=True) for key in a)


def test_grey_is_one_channel_and_no_class_is_no_label(options):
    (one,) = drawn(options, 1, in_channels=1, class_column=None)
    assert one["pixel_values"].shape == one["noise"].shape == (1, 8, 8)
    assert "class_labels" not in one


def test_other_sizes_are_brought_to_the_network_s(options):
    (one,) = drawn(options, 1, resolution=16)
    assert one["pixel_values"].shape == (3, 16, 16)

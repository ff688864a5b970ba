"""What tests of stored latents and text states share."""

import shutil
from collections import Counter

import pytest

from zsnr_diffusers.training.stable_diffusion import encoders


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

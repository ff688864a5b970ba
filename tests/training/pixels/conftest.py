import numpy as np
import pytest
from PIL import Image

from zsnr_diffusers.training import PixelTrainingConfig


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """A folder for each of three classes, with four images of 8 x 8 in each; do not change them."""
    folder, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / name).mkdir()
        for i in range(4):
            Image.fromarray(draw.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def options(class_folder, small_run):
    """A small run's options as a dictionary to change."""
    return {
        **small_run,
        "unet": "small-8",
        "train_data_dir": str(class_folder),
        "class_column": "label",
        "validation_images": 0,
    }


@pytest.fixture
def config(options):
    return PixelTrainingConfig(**options)

import pytest
from many_shapes import make_shapes
from published_models import RESOLUTION, published, shallow

from zsnr_diffusers.training import TrainingConfig


@pytest.fixture(scope="session")
def base_folder():
    """Stable Diffusion 1.5 on disk, with fewer layers than it has; do not change it."""
    return shallow()


@pytest.fixture
def small_run(tmp_path):
    """Options that all small runs share."""
    return {
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 2,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "luminance_images": 0,
    }


@pytest.fixture
def options(base_folder, image_folder, small_run):
    """A small run's options as a dictionary to change."""
    return {
        **small_run,
        "pretrained_model_name_or_path": str(base_folder),
        "train_data_dir": str(image_folder),
        "num_inference_steps": 2,
    }


@pytest.fixture
def config(options):
    return TrainingConfig(**options)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """Captioned images of many shapes; do not change them."""
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def xl_folder():
    """Stable Diffusion XL on disk; do not change it."""
    return published("xl")


@pytest.fixture
def xl_options(options, xl_folder, shapes_folder):
    """A small run on Stable Diffusion XL, in images of 64 x 64."""
    changes = {"pretrained_model_name_or_path": str(xl_folder), "train_data_dir": str(shapes_folder)}
    return {**options, **changes, "resolution": RESOLUTION}

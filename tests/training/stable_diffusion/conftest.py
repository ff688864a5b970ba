import pytest
from many_shapes import make_shapes
from published_models import RESOLUTION, published


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

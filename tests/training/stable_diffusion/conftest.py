import pytest
from many_shapes import make_shapes
from tiny_pipelines import tiny_whole_stable_diffusion_xl


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """Captioned pictures of many shapes; do not change them."""
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory):
    """A flawed Stable Diffusion XL of stock classes on disk, for pictures of 32 x 32; do not change it."""
    folder = tmp_path_factory.mktemp("xl")
    tiny_whole_stable_diffusion_xl().save_pretrained(folder)
    return folder


@pytest.fixture
def xl_options(options, xl_folder, shapes_folder):
    """A small run on Stable Diffusion XL, in pictures of 16 x 16."""
    changes = {"pretrained_model_name_or_path": str(xl_folder), "train_data_dir": str(shapes_folder)}
    return {**options, **changes, "resolution": 16}

import pytest
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion


@pytest.fixture
def folder(tmp_path):
    tiny_stable_diffusion(flawed_scheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"

import os
import sys

import pytest
import torch

# Tiny networks are fastest on one thread, and on a busy machine a second one only waits; children inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps its state in globals; each run of a process of its own starts without."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A flawed pipeline of stock classes on disk: epsilon, a schedule that never reaches pure noise, leading."""
    from small_stable_diffusion import flawed_scheduler
    from tiny_pipelines import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion(flawed_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Captioned pictures; do not change them."""
    from landscapes import make_landscapes

    return make_landscapes(tmp_path_factory.mktemp("landscapes"), count=10, image_size=16)

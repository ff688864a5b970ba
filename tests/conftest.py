import contextlib
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest
import torch

# Tiny networks are fastest on one thread, and on a busy machine a second one only waits; children inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is no property of ours
hypothesis.settings.load_profile("untimed")

CASES, MORE_CASES = 4, 3
"""Of a parametrized test, how many cases a plain run has, and how many `.ci/run` adds; the others are slow."""

ALL_CASES = Path(__file__).parent / "core"
"""Tests of the numbers take milliseconds, and most cases are of a branch of their own: a plain run has them all."""


def _spread(among, number):
    """So many of them from the first to the last, or all."""
    return {id(among[round(place * (len(among) - 1) / (number - 1))]) for place in range(number) if among}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark `full` or `slow` what a test's other cases are, so that every run has some of each test."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if not any(map(item.get_closest_marker, ("slow", "gpu"))) and ALL_CASES not in item.path.parents:
            cases[item.path, item.parent.nodeid, getattr(item, "originalname", item.name)].append(item)
    for alike in cases.values():
        plain = _spread(alike, CASES)
        others = [item for item in alike if id(item) not in plain]
        more = _spread(others, MORE_CASES)
        for item in others:
            item.add_marker(pytest.mark.full if id(item) in more else pytest.mark.slow)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps its state in globals; each run of a process of its own starts without."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.fixture
def log(caplog):
    """What diffusers' loggers say, ours among them."""
    import diffusers

    diffusers.utils.logging.enable_propagation()
    yield caplog
    diffusers.utils.logging.disable_propagation()


@pytest.fixture(scope="session")
def base_folder():
    """Stable Diffusion 1.5 on disk: epsilon, a schedule that never reaches pure noise, leading; do not change it."""
    from published_models import published

    return published("1.5")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Captioned images; do not change them."""
    from landscapes import make_landscapes

    return make_landscapes(tmp_path_factory.mktemp("landscapes"), count=10, image_size=64)


@pytest.fixture
def hub(monkeypatch):
    """`hub(repos, ...)`, as `hub_server.serve`, is the Hub to this process; returns where to, for `load_pipeline`."""
    import huggingface_hub
    from hub_server import serve

    constants, reset = huggingface_hub.constants, getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it asks again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset()  # older clients note it in their session
    with contextlib.ExitStack() as servers:

        def use(*args, endpoint=None, **kwargs):
            endpoint = endpoint or servers.enter_context(serve(*args, **kwargs))
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            for module in (constants, huggingface_hub.file_download):
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
            cache = Path(servers.enter_context(tempfile.TemporaryDirectory(prefix="hub-")), "cache")  # alone there
            cache.mkdir()
            # For commands, which take no such argument: what a user has in the cache is none of a test's business.
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
            return {"cache_dir": cache}

        yield use
    reset()

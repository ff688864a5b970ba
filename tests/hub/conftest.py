"""Fixtures of loading and saving."""

import contextlib
import json
import os

import huggingface_hub
import pytest
from hub_server import TOKEN, serve
from tiny_checkpoints import KINDS, tiny_pipeline


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    """Folders of `tiny_pipeline` by kind, as published for the architecture: epsilon, no zero SNR."""
    folders = {kind: tmp_path_factory.mktemp(f"sd-{kind}") for kind in KINDS}
    for kind, folder in folders.items():
        tiny_pipeline(kind).save_pretrained(folder)
    return folders


@pytest.fixture
def config_of(configs, tmp_path):
    """The same folder with another scheduler."""

    def config(kind, scheduler):
        for entry in configs[kind].iterdir():
            if entry.name not in ("scheduler", "model_index.json"):
                os.symlink(entry, tmp_path / entry.name)
        index = json.loads((configs[kind] / "model_index.json").read_text())
        index["scheduler"] = [type(scheduler).__module__.split(".schedulers")[0], type(scheduler).__name__]
        if type(scheduler).__module__.startswith("zsnr"):
            index["scheduler"][0] = "zsnr_diffusers.schedulers"
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        scheduler.save_pretrained(tmp_path / "scheduler")
        return tmp_path

    return config


@pytest.fixture
def said(caplog):
    """What the loaders say, by level."""
    caplog.set_level("INFO", logger="zsnr_diffusers")

    def lines(level):
        return [record.getMessage() for record in caplog.records if record.levelname == level]

    return lines


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """`hub(repos, ...)`, as `hub_server.serve`, is the Hub to this process; returns where to, for `load_pipeline`."""
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
            cache = tmp_path_factory.mktemp("cache")
            # For commands, which take no such argument: what a user has in the cache is none of a test's business.
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
            return {"cache_dir": cache}

        yield use
    reset()


@pytest.fixture
def there(hub, tmp_path, monkeypatch):
    """`there(failures=...)` is the Hub to a user with a token; returns its repos by id, and how they were made."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # another protocol, to another server
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: TOKEN)

    def use(repos=None, **kwargs):
        repos, made = {} if repos is None else repos, {}
        places = hub(repos, made=made, new=tmp_path / "hub", **kwargs)
        return repos, made, places

    return use

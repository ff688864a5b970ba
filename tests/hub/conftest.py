"""Fixtures of loading and saving."""

import json
import os

import huggingface_hub
import pytest
from hub_server import TOKEN
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

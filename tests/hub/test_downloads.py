"""Pipelines from the Hub, by the real client, and what is said where it fails."""

import json
import os
import pickle
import shutil

import huggingface_hub
import pytest
from hub_server import COMMIT, Failure, commit_of
from tiny_checkpoints import EPSILON, V, says, sd_scheduler, tiny_pipeline, write_file

from zsnr_diffusers import audit, load_pipeline
from zsnr_diffusers.hub.saved_model import SavedModel

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """Of a v model with zero SNR; do not change it."""
    folder = tmp_path_factory.mktemp("repo")
    tiny_pipeline("1", sd_scheduler(V, zero_snr=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(repo, tmp_path):
    """A copy with another `model_index.json` and with more files."""

    def change(index=None, **more):
        folder = shutil.copytree(repo, tmp_path / "changed")
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (index or {})))
        for name, content in more.items():
            (folder / name).write_bytes(content)
        return folder

    return change


@pytest.mark.full
def test_the_config_of_a_file_may_lie_there_and_the_caller_knows_better(repo, hub, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["v_pred"])
    places = hub({"acme/dark": repo})
    config = "the scheduler's config"
    facts = f"prediction_type='v_prediction' by {config}, rescale_betas_zero_snr=True by {config}"
    assert SavedModel.open("acme/dark", **places).facts == facts
    assert says(load_pipeline(file, config="acme/dark", **places)) == (V, False)  # as programs read v_pred alone
    told = {"prediction_type": EPSILON, "rescale_betas_zero_snr": False}
    assert says(load_pipeline("acme/dark", **told, **places)) == (EPSILON, False)


@pytest.mark.full
def test_a_revision_is_a_branch_or_a_commit(repo, changed, hub):
    night = changed()
    sd_scheduler(EPSILON).save_pretrained(night / "scheduler")
    places = hub({"acme/dark": repo, "acme/dark@night": night})
    for revision, model in (
        (None, (V, True)),
        ("main", (V, True)),
        (COMMIT, (V, True)),
        ("night", (EPSILON, False)),
        (commit_of("night"), (EPSILON, False)),
    ):
        assert says(load_pipeline("acme/dark", revision=revision, **places)) == model
        assert audit("acme/dark", revision=revision, **places).prediction_type == model[0]


NO_TOKEN = "log in with `hf auth login`, or pass token="
FAILURES = {
    "a missing index": (
        {"model_index.json": Failure(404, "EntryNotFound")},
        "has no pipeline: there is no model_index.json",
    ),
    "a missing file": ({WEIGHTS: Failure(404, "EntryNotFound")}, f"it has no file {WEIGHTS}"),
    "not authorized": ({"": Failure(401)}, f"it answers 401, not authorized over model_index.json: {NO_TOKEN}"),
    "forbidden": (
        {"": Failure(403)},
        "it answers 403, forbidden over model_index.json: your token lacks this permission",
    ),
    "gated": ({"": Failure(403, "GatedRepo")}, "it is gated: request access at https://huggingface.co/acme/dark"),
    "gated weights": ({WEIGHTS: Failure(403, "GatedRepo")}, "it is gated: request access"),
    "private": (
        {"": Failure(401, "RepoNotFound")},
        f"the repo does not exist or is private: check the id, or {NO_TOKEN}",
    ),
    "broken": ({"": Failure(500)}, "it answers 500 over model_index.json; try again later"),
    "broken for one file": ({WEIGHTS: Failure(500)}, f"it answers 500 over {WEIGHTS}; try again later"),
    "cut off": ({WEIGHTS: Failure(cut=1000)}, "the connection failed"),
    "cut off in the index": ({"model_index.json": Failure(cut=5)}, "the connection failed"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("function", [load_pipeline, audit])
def test_a_failure_is_said_in_one_sentence_with_the_repo_and_the_remedy(function, name, repo, hub):
    failures, message = FAILURES[name]
    places = hub({"acme/dark": repo}, failures=failures)
    if function is audit and (WEIGHTS in failures or name == "a missing index"):
        assert audit("acme/dark", **places).ok  # which needs none of it
        return
    with pytest.raises(
        OSError, match=r"^acme/dark (has no pipeline|is not a local folder or file, and cannot be read from the Hub): "
    ) as caught:
        function("acme/dark", **places)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("function", [load_pipeline, audit])
def test_what_is_not_there_is_said(function, repo, hub):
    places = hub({"acme/dark": repo})
    with pytest.raises(OSError, match=r"acme/none .*the repo does not exist or is private"):
        function("acme/none", **places)
    with pytest.raises(OSError, match=r"acme/dark .*it has no such revision: check the branch"):
        function("acme/dark", revision="nowhere", **places)


@pytest.mark.parametrize("function", [load_pipeline, audit])
def test_no_connection(function, hub, monkeypatch):
    places = hub(endpoint="http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"acme/dark .*the connection failed .*\(.*refused.*\); retry"):
        function("acme/dark", **places)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)()
    with pytest.raises(
        OSError,
        match=r"acme/dark .*HF_HUB_OFFLINE is set, and the requested file is not in the "
        r"cache",
    ):
        function("acme/dark", **places)


def test_what_is_cut_off_once_goes_on(repo, hub):
    """By the client itself, or in the next call, where older ones raise; the weights are whole."""
    places = hub({"acme/dark": repo}, failures={WEIGHTS: Failure(cut=1000, times=1)})
    try:
        pipe = load_pipeline("acme/dark", **places)
    except OSError as error:
        assert "the connection failed" in str(error)  # noqa: PT017
        pipe = load_pipeline("acme/dark", **places)
    assert says(pipe) == (V, True)
    (weights,) = places["cache_dir"].rglob(WEIGHTS)
    assert weights.read_bytes() == (repo / WEIGHTS).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "../../../outside.json",
        "scheduler/../../../../../outside.json",
        "scheduler/..\\..\\..\\..\\outside.json",
        "/tmp/outside.json",
        "scheduler//tmp/outside.json",
        "unet/../../../../../../outside.safetensors",
    ],
)
def test_names_that_lead_out_of_the_cache_write_nothing_there(name, repo, hub):
    """Whether the client refuses the repo or leaves the file out."""
    places = hub({"acme/dark": repo}, more={name: b"{}"})
    cache = places["cache_dir"]
    before = {path for path in cache.parent.rglob("*") if not path.is_relative_to(cache)}
    try:
        load_pipeline("acme/dark", **places)
    except (OSError, ValueError) as error:
        assert str(error).startswith("acme/dark")  # noqa: PT017
    assert {path for path in cache.parent.rglob("*") if not path.is_relative_to(cache)} == before
    assert not os.path.exists("/tmp/outside.json")


# -- code


@pytest.fixture
def ran(tmp_path):
    """What a repo's code leaves behind."""
    return tmp_path / "ran"


def code(ran):
    return f"""
import pathlib
from diffusers import DDIMScheduler, StableDiffusionPipeline
pathlib.Path({str(ran)!r}).touch()
class TheirScheduler(DDIMScheduler): pass
class TheirPipeline(StableDiffusionPipeline): pass
""".encode()


class Pickled:
    """Makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(params=["folder", "Hub"])
def source(request, hub):
    """What to load a folder by: its path, or the id of the repo that it is at the Hub."""

    def of(folder):
        return (folder, {}) if request.param == "folder" else ("acme/dark", hub({"acme/dark": folder}))

    return of


@pytest.mark.full
def test_code_beside_a_pipeline_is_not_run(changed, source, ran):
    pickled = pickle.dumps(Pickled(str(ran)))
    more = {"pipeline.py": code(ran), "scheduler/theirs.py": code(ran), "unet/diffusion_pytorch_model.bin": pickled}
    place, places = source(changed(**more))
    assert says(load_pipeline(place, **places)) == (V, True)
    assert audit(place, **places).ok
    assert not ran.exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("index", "file"),
    [
        ({"_class_name": ["pipeline", "TheirPipeline"]}, "pipeline.py"),
        ({"scheduler": ["theirs", "TheirScheduler"]}, "scheduler/theirs.py"),
    ],
)
def test_code_that_a_pipeline_needs_is_run_where_it_is_trusted(
    index, file, changed, source, ran, monkeypatch, tmp_path
):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    place, places = source(changed(index, **{file: code(ran)}))
    with pytest.raises(ValueError, match=r"code.*trust_remote_code=True"):
        load_pipeline(place, **places)
    assert not ran.exists()
    load_pipeline(place, trust_remote_code=True, **places)
    assert ran.exists()


def test_a_module_that_an_index_names_is_not_imported(changed, source, ran, monkeypatch, tmp_path):
    (tmp_path / "theirs.py").write_bytes(code(ran))
    monkeypatch.syspath_prepend(tmp_path)
    place, places = source(changed({"scheduler": ["theirs", "TheirScheduler"]}))
    with pytest.raises(ValueError, match="theirs"):
        load_pipeline(place, **places)
    assert not ran.exists()


def test_weights_in_a_pickle_alone_are_read_without_running_it(changed, source, ran):
    folder = changed(**{"unet/diffusion_pytorch_model.bin": pickle.dumps(Pickled(str(ran)))})
    (folder / WEIGHTS).unlink()
    place, places = source(folder)
    with pytest.raises((OSError, ValueError)):
        load_pipeline(place, **places)
    assert not ran.exists()

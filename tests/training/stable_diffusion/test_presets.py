"""Options by the memory of the machine: others win over them, and what they set is written down and fits."""

import dataclasses

import pytest
import yaml

from zsnr_diffusers.training import TrainingConfig, parse_config, train
from zsnr_diffusers.training.stable_diffusion.presets import PRESETS

LEAST = {"pretrained_model_name_or_path": "base", "train_data_dir": "photos"}
ARGUMENTS = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "photos"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_options_and_nothing_else(name):
    config, plain = TrainingConfig(**LEAST, preset=name), TrainingConfig(**LEAST)
    options = {"preset": name, **PRESETS[name].options}
    assert config == dataclasses.replace(plain, **options)
    assert all(getattr(plain, option) != value for option, value in options.items())
    assert parse_config([*ARGUMENTS, "--preset", name]) == config


def test_the_command_line_wins_over_a_file_and_both_over_a_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: 80gb\ntrain_batch_size: 2\nuse_8bit_adam: no\n")
    arguments = [*ARGUMENTS, "--config", str(file), "--preset", "24gb", "--no_gradient_checkpointing"]
    config = parse_config([*arguments, "--ema_update_interval", "1"])
    assert config.preset == "24gb"
    assert (config.train_batch_size, config.use_8bit_adam) == (2, False)
    assert (config.gradient_checkpointing, config.ema_update_interval) == (False, 1)  # defaults, but passed
    assert (config.gradient_accumulation_steps, config.ema_device) == (8, "cpu")


def test_what_was_written_down_stays_when_a_preset_changes(tmp_path, monkeypatch):
    config = TrainingConfig(**LEAST, preset="80gb", train_batch_size=4)
    file = tmp_path / "training_config.yaml"
    file.write_text(config.to_yaml())
    changed = PRESETS["80gb"]._replace(options={"train_batch_size": 64, "channels_last": True})
    monkeypatch.setitem(PRESETS, "80gb", changed)
    assert parse_config(["--config", str(file)]) == config
    assert dataclasses.replace(config, seed=1).train_batch_size == 4


@pytest.mark.parametrize("wrong", ["24bg", "80g"])
def test_the_nearest_preset_is_named(wrong, tmp_path, capsys):
    nearest = {"24bg": "24gb", "80g": "80gb"}[wrong]
    with pytest.raises(ValueError, match=f"--preset='{wrong}' is unknown; choose one of .*; did you mean {nearest}"):
        TrainingConfig(**LEAST, preset=wrong)
    with pytest.raises(SystemExit):
        parse_config([*ARGUMENTS, "--preset", wrong])
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_help_says_what_is_in_them(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, preset in PRESETS.items():
        assert f"{name}: mixed_precision {preset.options['mixed_precision']}, " in text
        assert all(option in text for option in preset.options)


@pytest.mark.full
def test_the_plan_and_the_record_have_what_was_set(options, capsys, tmp_path):
    few = {"preset": "24gb", "use_8bit_adam": False, "dataloader_num_workers": 0, "max_train_steps": 1}
    config = TrainingConfig(**{**options, **few})
    train(dataclasses.replace(config, dry_run=True))
    plan = " ".join(capsys.readouterr().out.split())
    assert "preset: 24gb: mixed_precision bf16, gradient_checkpointing yes, ema_device cpu" in plan
    assert "passed instead: use_8bit_adam no, train_batch_size 2, dataloader_num_workers 0" in plan
    assert "gradient_accumulation_steps: 8" in plan
    train(dataclasses.replace(config, gradient_accumulation_steps=1))
    written = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert (written["preset"], written["ema_device"], written["ema_update_interval"]) == ("24gb", "cpu", 50)


def test_a_step_that_does_not_fit_is_refused_before_anything_is_written(options, monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "80gb", PRESETS["80gb"]._replace(gigabytes=3.001))
    with pytest.raises(ValueError, match=r"A step takes .* GB, and of the 3.001 GB .*: .*no batch is small enough"):
        train(TrainingConfig(**{**options, "preset": "80gb"}))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".yaml")]

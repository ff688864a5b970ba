import dataclasses

import pytest

from zsnr_diffusers.training import RECIPES, PixelTrainingConfig, parse_config

LEAST = {"train_data_dir": "photos"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_in_python_on_the_command_line_and_as_a_file(name, tmp_path):
    config = PixelTrainingConfig.from_recipe(name, **LEAST, seed=3)
    assert parse_config(["--recipe", name, "--train_data_dir", "photos", "--seed", "3"], PixelTrainingConfig) == config
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "run.yaml")], PixelTrainingConfig) == config


def test_a_file_wins_over_a_recipe_and_the_command_line_over_both(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_data_dir: photos\nlearning_rate: 1e-3\nmax_train_steps: 7\n")
    given = ["--max_train_steps", "9", "--recipe", "cifar10-ddpm", "--config", str(file)]
    config = parse_config(given, PixelTrainingConfig)
    assert (config.max_train_steps, config.learning_rate, config.train_batch_size) == (9, 1e-3, 128)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("-zsnr")])
def test_a_twin_differs_in_schedule_and_prediction_alone(name):
    recipe, twin = RECIPES[name], RECIPES[f"{name}-zsnr"]
    changed = {option: twin[option] for option in recipe if twin[option] != recipe[option]}
    assert changed == {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert recipe.keys() == twin.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": "ddpm"}, "--unet='ddpm' is not a preset; choose one of ddpm-cifar10"),
        ({"in_channels": 4}, "--in_channels=4 is unknown; choose one of 1, 3"),
        ({"dropout": 1.0}, r"--dropout=1.0 must lie in \[0, 1\)"),
        ({"class_dropout": -0.1}, r"--class_dropout=-0.1 must lie in \[0, 1\]"),
        ({"variance_type": "learned"}, "variance_type='learned' is unknown"),
        ({"beta_end": 0.0}, "--beta_end=0.0 must be above 0"),
        ({"validation_images": -1}, "--validation_images=-1 must not be negative"),
        ({"prediction_type": "epsilon"}, "cannot be used at zero signal-to-noise"),
        ({"train_data_dir": None}, "one of --dataset_name, --train_data_dir, --train_shards and --data_mix"),
        (
            {"train_data_dir": None, "dry_run": True},
            "one of --dataset_name, --train_data_dir, --train_shards and --data_mix",
        ),
        ({"measure": True}, "pass --dry_run"),
    ],
)
def test_bad_options_name_value_and_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        PixelTrainingConfig(**{**LEAST, **change})


def test_unknown_recipes_are_refused(capsys):
    with pytest.raises(ValueError, match="unknown recipe 'cifar'; choose one of cifar10-ddpm"):
        PixelTrainingConfig.from_recipe("cifar", **LEAST)
    with pytest.raises(SystemExit):
        parse_config(["--recipe", "cifar", "--train_data_dir", "photos"], PixelTrainingConfig)
    assert "cifar10-ddpm-zsnr" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], PixelTrainingConfig)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--recipe cifar10-ddpm-zsnr" in text
    for option in dataclasses.fields(PixelTrainingConfig):
        assert f"--{option.name}" in text

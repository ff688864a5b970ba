import re
from itertools import pairwise

from pages import ROOT, commands, guide
from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.training import parse_config, train

RECIPE = ROOT / "examples" / "configs" / "lin2023.yaml"
PAGE = guide("reproducing_the_paper")


def test_the_recipe_is_the_paper_s(monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands(PAGE, "zsnr_diffusers.training")
    changes = re.search(r"same data without fixes, add `([^`]+)`", PAGE)[1].split()
    fixed, unchanged = parse_config(command), parse_config([*command, *changes])
    for config in (fixed, unchanged):
        assert config.global_batch(processes=8) == 2048
        assert (config.max_train_steps, config.learning_rate, config.ema_decay) == (50_000, 1e-4, 0.9999)
        assert config.resolution == 512
        assert config.loss_weighting == "constant"
    assert (fixed.prediction_type, fixed.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (unchanged.prediction_type, unchanged.rescale_betas_zero_snr) == ("epsilon", False)
    assert (fixed.guidance_scale, fixed.guidance_rescale, fixed.keep_low_frequencies) == (7.5, 0.7, 0)
    assert fixed.output_dir != unchanged.output_dir


def test_a_dry_run_accepts_the_recipe(tmp_path, image_folder, capsys):
    tiny_stable_diffusion(flawed_scheduler()).save_pretrained(tmp_path / "base")
    given = ("--pretrained_model_name_or_path", tmp_path / "base", "--train_data_dir", image_folder)
    given += ("--output_dir", tmp_path / "out", "--mixed_precision", "no", "--dry_run")
    train(parse_config(["--config", str(RECIPE), *map(str, given)]))
    plan = capsys.readouterr().out
    assert "v_prediction" in plan
    assert "50000" in plan
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_the_commands_of_the_table_get_as_far_as_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = [command for command in commands(PAGE, "zsnr") if "--fid" in command]
    assert len(table) == 3
    for command in table:
        assert zsnr(command) == 2
        assert "coco-val2014" in capsys.readouterr().err
        option = dict(pairwise(command))
        assert (option["--num_images"], option["--num_inference_steps"]) == ("10000", "50")
        assert option["--guidance_scale"] == "7.5"

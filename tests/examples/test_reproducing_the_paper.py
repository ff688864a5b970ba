import re
import shlex
from itertools import pairwise
from pathlib import Path

from small_stable_diffusion import flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

import zsnr_diffusers
from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.training import parse_config, train

ROOT = Path(zsnr_diffusers.__file__).parents[1]
RECIPE = ROOT / "examples" / "configs" / "lin2023.yaml"
PAGE = (ROOT / "examples" / "guides" / "reproducing_the_paper.md").read_text(encoding="utf-8")


def commands(program):
    """Arguments of the page's commands of a program."""
    text = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[line.index(program) + 1 :] for line in words if program in line]


def test_the_recipe_is_the_paper_s(monkeypatch):
    monkeypatch.chdir(ROOT)
    fixed, unchanged = map(parse_config, commands("zsnr_diffusers.training"))
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
    table = [command for command in commands("zsnr") if "--fid" in command]
    assert len(table) == 3
    for command in table:
        assert zsnr(command) == 2
        assert "coco-val2014" in capsys.readouterr().err
        option = dict(pairwise(command))
        assert (option["--num_images"], option["--num_inference_steps"]) == ("10000", "50")
        assert option["--guidance_scale"] == "7.5"

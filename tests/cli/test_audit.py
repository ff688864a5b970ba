import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import audit
from zsnr_diffusers.cli import main


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """Of DDIM, at zero terminal SNR."""
    folder = tmp_path_factory.mktemp("right")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def leading(right, tmp_path):
    """The same with a spacing that misses the last timestep."""
    folder = tmp_path / "leading"
    shutil.copytree(right, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"trailing"', '"leading"'))
    return folder


def run(*arguments):
    return main(["audit", *map(str, arguments)])


@pytest.mark.full
def test_right_is_0_and_wrong_is_1(right, leading, base_folder, capsys):
    assert run(right) == 0
    assert capsys.readouterr().out == f"{audit(right)}\n"
    assert run(leading) == 1
    assert "error  last-timestep-missed: sampling starts from pure noise at timestep" in capsys.readouterr().out
    assert run(base_folder) == 1  # epsilon, never trained there
    assert "terminal-snr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "/no/such/folder does not exist"),
        (["acme/dark", "--fix"], "--fix acme/dark: only local folders can be fixed"),
        (["acme/dark", "--prompts", "a cat"], "--prompts: only with --deep"),
        (["acme/dark", "--device", "cpu", "--prompts", "a"], "--prompts, --device: only with --deep"),
        (["."], "has no scheduler"),
    ],
)
def test_wrong_arguments_are_2_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


@pytest.mark.full
def test_fix_mends_and_says_what(leading, capsys):
    assert run(leading, "--fix") == 0
    out = capsys.readouterr().out
    assert out.startswith("fixed: last-timestep-missed")
    assert "\n  class: DDIMScheduler -> EulerDiscreteScheduler\n" in out
    assert "\n  timestep_spacing: leading -> trailing\n" in out
    assert out.endswith("verdict: OK\n")
    assert run(leading) == 0
    capsys.readouterr()
    assert run(leading, "--fix") == 0
    assert capsys.readouterr().out.startswith("nothing was changed")


@pytest.mark.full
def test_what_is_known_of_the_training_decides(leading, capsys):
    path = Path(leading, "scheduler", "scheduler_config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}))
    assert run(leading, "--fix", "--prediction_type", "v_prediction", "--zero_snr", "yes") == 0
    assert json.loads(path.read_text())["rescale_betas_zero_snr"] is True
    assert json.loads(path.read_text())["prediction_type"] == "v_prediction"
    assert run(leading, "--zero_snr", "no") == 1
    assert "flag-without-training" in capsys.readouterr().out


@pytest.mark.full
def test_json_and_plot(right, tmp_path, capsys):
    text, plot = tmp_path / "there" / "audit.json", tmp_path / "there" / "schedule.png"
    assert run(right, "--json", text, "--plot", plot) == 0
    assert json.loads(text.read_text()) == audit(right).to_dict()
    assert json.loads(text.read_text())["ok"] is True
    with Image.open(plot) as image:
        assert image.size == (1050, 675)


def test_deep_tries_every_number_of_steps_and_loads_the_weights(tmp_path, capsys):
    tiny_unconditional().save_pretrained(tmp_path)
    small = Path(tmp_path, "scheduler", "scheduler_config.json")
    config = json.loads(small.read_text())
    small.write_text(json.dumps({**config, "num_train_timesteps": 20}))
    assert run(tmp_path, "--deep", "--device", "cpu") == 1  # nobody trained it
    out = capsys.readouterr().out
    assert "tested at             20 step counts" in out
    assert "terminal invariance: " in out
    assert "not-trained-there" in out


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    assert "zsnr audit sd21-zsnr/ --fix" in capsys.readouterr().out

import json

import pytest
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


def test_images_side_by_side(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a night sky\nsnow\n")
    target = tmp_path / "compared"
    names = ["zsnr", "UniPCMultistepScheduler"]
    line = ["compare", folder, "--schedulers", *names, "--steps", 1, 2, "--prompts_file", prompts]
    options = ["--reference-steps", 4, "--guidance_scale", 2, "--seed", 3, "--output_dir", target, "--device", "cpu"]
    assert main([*map(str, [*line, *options])]) == 0
    out = capsys.readouterr().out
    assert [row.split()[0] for row in out.splitlines()[1:3]] == ["zsnr", "UniPCMultistepScheduler"]
    assert f"written: comparison.html, .png and .json in {target}" in out
    assert {path.name for path in target.iterdir()} == {f"comparison.{end}" for end in ("html", "json", "png")}
    read = json.loads((target / "comparison.json").read_text())
    assert (read["seed"], read["call"], read["reference"]["steps"]) == (3, {"guidance_scale": 2.0}, 4)


def test_no_scheduler_gave_an_image(folder, tmp_path, capsys):
    line = ["compare", folder, "--schedulers", "FlowMatchHeunDiscreteScheduler", "--steps", 1, "--prompts", "snow"]
    assert main([*map(str, [*line, "--reference_steps", 1, "--output_dir", tmp_path / "out"])]) == 1
    assert "FlowMatchHeunDiscreteScheduler at 1 steps failed: ValueError" in capsys.readouterr().out


def test_a_wrong_name_is_refused_before_the_model_is_looked_for(tmp_path, capsys):
    line = ["compare", "no/such-model", "--schedulers", "dpmp_2m", "--prompts", "x", "--output_dir", str(tmp_path)]
    assert main(line) == 2
    assert "zsnr compare: error: unknown scheduler dpmp_2m; did you mean dpmpp_2m?" in capsys.readouterr().err

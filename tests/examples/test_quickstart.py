"""The examples run whole at tiny sizes; what they show at full size is printed by themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pixel_landscapes
import pytest
import quickstart
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from quickstart_report import REAL

from zsnr_diffusers.start import Start

TINY = quickstart.Sizes(
    images=24, vae_steps=2, flawed_steps=2, retrained_steps=2, images_per_prompt=2, num_inference_steps=2
)


def weights(folder):
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of the quickstart at tiny sizes, and its figures; do not change it."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart.main(folder, sizes=TINY)


@pytest.mark.full
def test_models_are_trained_as_their_rows_say(made):
    folder, figures = made
    assert [*figures] == [*(arm.name for arm in quickstart.ARMS), REAL]
    for row in figures.values():
        assert -1 <= row["p5"] <= row["p95"] <= 1
    schedulers = {
        arm: DiffusionPipeline.from_pretrained(folder / arm).scheduler
        for arm in ("flawed", "v-stock-schedule", "retrained")
    }
    assert schedulers["flawed"].config.prediction_type == "epsilon"
    assert schedulers["flawed"].config.timestep_spacing == "leading"
    assert schedulers["v-stock-schedule"].config.prediction_type == "v_prediction"
    assert schedulers["v-stock-schedule"].alphas_cumprod[-1] == schedulers["flawed"].alphas_cumprod[-1]
    assert type(schedulers["retrained"]) is EulerDiscreteScheduler
    assert schedulers["retrained"].config.rescale_betas_zero_snr
    index = json.loads((folder / "retrained" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    start = Start.load(folder / "start.safetensors")
    assert start.base == "flawed"
    assert (start.law.num_features, start.law.noise) == (64, quickstart.START_NOISE)


@pytest.mark.full
def test_the_folder_holds_what_its_readme_says_and_nothing_that_is_done_with(made):
    folder, _ = made
    text = (folder / "README.md").read_text()
    named = {line.split("`")[1].rstrip("/") for line in text.splitlines() if line.startswith("| `")} | {"progress.log"}
    assert named | {"README.md"} == {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("checkpoint-*"))
    assert len(list((folder / "images" / "flawed-with-start").glob("a-white-landscape-*.png"))) == 2
    with Image.open(folder / "samples.png") as sheet, Image.open(folder / "before_after.png") as pair:
        assert sheet.width > pair.width > 9 * 128


@pytest.mark.full
def test_run_again_it_makes_what_is_missing_and_says_the_same(made, capsys, monkeypatch):
    folder, figures = made
    before, record = weights(folder / "retrained"), folder / "progress.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "seconds": dict([*found["seconds"].items()][:-1])}))
    monkeypatch.setattr(
        quickstart, "train_stable_diffusion", lambda *args, **kwargs: pytest.fail("trains what is trained")
    )
    assert quickstart.main(folder, sizes=TINY) == figures
    assert weights(folder / "retrained") == before
    printed = capsys.readouterr()
    assert printed.err.count("images: retrained") == 1
    assert "training" not in printed.err
    assert json.loads(record.read_text())["seconds"].keys() == found["seconds"].keys()
    for line in printed.out.splitlines()[:-1]:
        assert len(line) <= 80
    for name in figures:
        assert name in printed.out
    for word in ("black", "dark", "dim", "grey", "bright", "white"):
        assert f"a {word} landscape" in printed.out


@pytest.mark.full
def test_refuses_a_folder_of_other_settings(made):
    with pytest.raises(SystemExit, match="was made with seed 0, not 1: pass another --output_dir, or delete it"):
        quickstart.main(made[0], seed=1, sizes=TINY)


def test_each_image_has_a_seed_of_its_own_but_for_those_in_the_pictures():
    seeds = quickstart.Quickstart(Path("unused"), 0, quickstart.Sizes()).seeds
    by_prompt = [seeds[i : i + 32] for i in range(0, len(seeds), 32)]
    assert all(some[:3] == [0, 1, 2] and len(set(some)) == 32 for some in by_prompt)
    assert len({seed for some in by_prompt for seed in some[3:]}) == 6 * 29


@pytest.mark.full
@pytest.mark.parametrize(("set_by_user", "threads"), [({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_one_thread_unless_the_user_wants_more(set_by_user, threads):
    code = "import quickstart, os; print(os.environ['OMP_NUM_THREADS'])"
    examples = str(Path(quickstart.__file__).parent)
    unset = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
    env = unset | set_by_user | {"PYTHONPATH": os.pathsep.join([examples, *sys.path])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [threads]


@pytest.mark.full
def test_pixel_mode_trains_compares_and_draws(tmp_path, capsys):
    sizes = pixel_landscapes.Sizes(images=24, steps=2, samples=4, num_inference_steps=2)
    coverages = pixel_landscapes.main(tmp_path, sizes=sizes)
    text = capsys.readouterr().out
    assert len(coverages) == 3
    assert all(name in text for name in coverages)
    assert (tmp_path / "brightness-pixels.png").exists()
    assert (tmp_path / "samples-pixels.png").exists()

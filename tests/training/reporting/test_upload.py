import os
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from child_processes import exit_code, start_ranks
from diffusers import DiffusionPipeline
from hub_server import OWNER, in_place_of_the_hub, talk_to_the_server
from huggingface_hub import ModelCard
from training_runs import logged

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, TrainingError, train
from zsnr_diffusers.training.reporting.luminance import read_luminance_file
from zsnr_diffusers.training.reporting.upload import create_run_repo, hub_repo_name
from zsnr_diffusers.training.trainer import Trainer

SHIPPED = {"README.md", "model_index.json", "pipeline.py", "luminance.json", "luminance.png"} | {
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"),
    *("previews/step-000000.png", "previews/step-000004.png"),
}


@pytest.fixture
def pushed(options):
    """A small run's options, pushed to `acme/landscapes`, with everything in its folder that a run can have there."""
    return options | {
        **{"push_to_hub": True, "hub_model_id": "landscapes", "report_to": "tensorboard", "luminance_images": 2},
        **{"validation_steps": 2, "validation_prompts": ["snow"], "cache_dir": f"{options['output_dir']}/latents"},
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repos, requests and failures of a server in the Hub's place, to which the real client talks."""
    state = {"repos": {}, "requests": [], "failures": {}, "made": {}}
    with in_place_of_the_hub(monkeypatch, **state, new=tmp_path / "hub"):
        yield state


def files(folder):
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


FROZEN = ("vae/", "text_encoder/", "tokenizer/", "safety_checker/", "feature_extractor/")


def test_what_is_shipped_is_pushed_and_nothing_else(pushed, hub):
    train(TrainingConfig(**pushed))
    there, here = files(hub["repos"]["acme/landscapes"]), files(pushed["output_dir"])
    frozen = {name for name in there if name.startswith(FROZEN)}
    assert set(there) - frozen == SHIPPED
    assert {f"{name.split('/')[0]}/" for name in frozen} == {*FROZEN}
    assert there == {name: here[name] for name in there}
    assert {"checkpoint-000004/manifest.json", "previews/step-000002.png", "training_config.yaml"} <= set(here)
    assert any(name.startswith("latents/") for name in here)
    assert hub["requests"].count("api/models/acme/landscapes/commit/main") == 1
    DiffusionPipeline.from_pretrained(hub["repos"]["acme/landscapes"])
    check_card(pushed, hub["repos"]["acme/landscapes"])


def check_card(pushed, folder):
    """It shows before and after."""
    card = ModelCard.load(folder / "README.md")
    coverages = read_luminance_file(folder)
    for step, name in ((0, "before"), (4, "after 4 steps")):
        ours = coverages[step].generated
        assert f"| {name} | {ours.p5:.2f} to {ours.p95:.2f} | {coverages[step].w1:.3f}, floor" in card.content
        assert f"(previews/step-{step:06d}.png)" in card.content
    assert f"| the data | {coverages[4].real.p5:.2f} to {coverages[4].real.p95:.2f} | |" in card.content
    mean = np.mean([value for _, value in logged(pushed["output_dir"])["loss"]])
    assert f"Training loss: {mean:.4g}, the mean of the last 4 steps." in card.content
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.content, re.DOTALL)[1])
    config = vars(TrainingConfig(**pushed))
    assert options == {name: config[name] for name in options}
    assert {"seed", "learning_rate", "validation_prompts", "max_train_steps"} <= set(options)
    for name in ("output_dir", "train_data_dir", "pretrained_model_name_or_path", "cache_dir"):
        assert pushed[name] not in card.content


@pytest.mark.full
def test_a_network_of_pixels_is_pushed_alike(small_run, image_folder, hub):
    config = PixelTrainingConfig(
        **{**small_run, "luminance_images": 1, "validation_images": 1, "num_inference_steps": 1, "max_train_steps": 1},
        unet="small-16",
        train_data_dir=str(image_folder),
        push_to_hub=True,
    )
    train(config)
    there = files(hub["repos"]["acme/run"])
    assert set(there) == {"README.md", "model_index.json", "luminance.json", "luminance.png"} | {
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"),
        "previews/step-000001.png",  # a new network has no before
    }
    card = there["README.md"].decode()
    assert "| after 1 steps |" in card
    assert "| before |" not in card


@pytest.mark.full
def test_the_loss_of_a_run_that_went_on_is_that_of_a_whole_one(options, tmp_path):
    def card(name, *steps):
        for count in steps:
            changes = {"output_dir": str(tmp_path / name), "max_train_steps": count, "resume": True}
            train(TrainingConfig(**{**options, **changes}))
        return (tmp_path / name / "README.md").read_text().partition("## Results")[2]

    assert card("whole", 4) == card("stopped", 2, 4)
    assert "the mean of the last 4 steps" in card("whole", 4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "variables", "refuse", "message"),
    [
        (
            {},
            {"HF_TOKEN": "hf_other"},
            {},
            "landscapes cannot be created or written on the Hub: it answers 401, not authorized",
        ),
        ({}, {}, {"repos/create": 500}, "written on the Hub: it answers 500; try again later. Check"),
        ({}, {}, {"repos/create": 403, "preupload/main": 403}, "written on the Hub: it answers 403, forbidden"),
        ({}, {}, {"preupload/main": 403}, "written on the Hub: it answers 403, forbidden"),
        ({"hub_model_id": "acme/of/mine"}, {}, {}, "--hub_model_id='acme/of/mine' is not a valid repo name"),
        ({"hub_model_id": "acme/-x"}, {}, {}, "is not a valid repo name"),
        ({}, {"HF_TOKEN": ""}, {}, "needs a token with write access: run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(pushed, hub, monkeypatch, changes, variables, refuse, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Trainer, "__init__", None)
    hub["failures"] |= refuse
    with pytest.raises(ValueError, match=re.escape(message)):
        train(TrainingConfig(**{**pushed, **changes}))
    assert "hf_o" not in message
    assert not (Path(pushed["output_dir"]) / "training_config.yaml").exists()


def test_a_rehearsal_checks_name_and_token_and_makes_nothing(pushed, hub, monkeypatch):
    train(TrainingConfig(**pushed, dry_run=True))
    assert hub["requests"] == []
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="needs a token"):
        train(TrainingConfig(**pushed, dry_run=True))


def test_offline_is_refused(pushed, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1: unset it"):
        hub_repo_name(TrainingConfig(**pushed))


def test_the_repo_is_called_as_the_folder_and_is_private_if_wanted(pushed, hub, options):
    config = TrainingConfig(**{**pushed, "hub_model_id": None, "hub_private_repo": True})
    assert create_run_repo(config) == f"{OWNER}/run"
    assert create_run_repo(config) == f"{OWNER}/run"  # it is there
    create_run_repo(TrainingConfig(**pushed))
    assert hub["made"] == {"acme/run": "private", "acme/landscapes": None}


@pytest.mark.full
@pytest.mark.parametrize(("ending", "status"), [("commit/main", 500), ("commit/main", 401), ("objects/batch", 403)])
def test_a_push_that_fails_leaves_the_result_and_is_repeated(pushed, hub, ending, status):
    hub["failures"][ending] = status
    pushed |= {"luminance_images": 0, "validation_prompts": []}
    with pytest.raises(
        TrainingError, match=rf"saved in .*could not be pushed: it answers {status}.*\. .*--resume"
    ) as failed:
        train(TrainingConfig(**pushed))
    assert files(hub["repos"]["acme/landscapes"]) == {}
    DiffusionPipeline.from_pretrained(pushed["output_dir"])
    hub["failures"].clear()
    if status == 401:  # by hand, as the message says
        code = re.search(r"Manually: python -c '(.*)'$", str(failed.value))[1]
        exec(code, {})
    else:
        train(TrainingConfig(**pushed, resume=True))
    there = files(hub["repos"]["acme/landscapes"])
    assert "model_index.json" in there
    assert not [name for name in there if name.startswith(("checkpoint", "logs", "latents", "."))]


@pytest.mark.full
def test_of_two_processes_one_pushes_and_both_fail(pushed, hub, tmp_path):
    pushed |= {"max_train_steps": 1, "luminance_images": 1, "validation_prompts": [], "report_to": "none"}
    hub["failures"]["commit/main"] = 500
    server = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_TOKEN")}
    processes = start_ranks(pushed, tmp_path, talk_to_the_server, environment=server)
    assert [exit_code(process) for process in processes] == [1, 1]
    for rank in range(2):
        assert "could not be pushed: it answers 500" in (tmp_path / f"rank{rank}.log").read_text()
    for path in ("api/repos/create", "api/models/acme/landscapes/commit/main"):
        assert hub["requests"].count(path) == 1
    assert list(read_luminance_file(Path(pushed["output_dir"]))) == [0, 1]
    DiffusionPipeline.from_pretrained(pushed["output_dir"])

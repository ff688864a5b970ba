import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from child_processes import arguments
from diffusers import DiffusionPipeline
from hub_server import serve
from landscapes import make_landscapes, read_landscapes
from pseudo_terminal import BOX, on_terminal
from safetensors.torch import load_file
from small_stable_diffusion import train_vae
from training_runs import logged, same, trained, weights

from zsnr_diffusers.core import v_loss
from zsnr_diffusers.training import TrainingConfig, TrainingError, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


def losses(folder, tag="loss"):
    return [value for _, value in logged(folder)[tag]]


def command(options, **changes):
    return ["-m", "zsnr_diffusers.training", *arguments({**options, **changes})]


def test_the_same_run_twice_is_bitwise_the_same(options, tmp_path):
    first = run(options)
    second = run(options, output_dir=str(tmp_path / "second"))
    assert same(first, second)
    other = run(options, output_dir=str(tmp_path / "third"), seed=1)
    assert not same(first, other)


@pytest.mark.full
def test_training_lowers_the_loss_at_the_last_timestep_too(options, base_folder, tmp_path):
    """At T the sample is pure noise and v is -x_0: a weighting that is 0 there would leave the network as it is."""
    data = make_landscapes(tmp_path / "data", count=10, image_size=64)
    images = read_landscapes(data)
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    train_vae(pipe.vae, images, steps=60)
    pipe.save_pretrained(tmp_path / "base")
    captions = [json.loads(line)["text"] for line in (data / "metadata.jsonl").read_text().splitlines()]

    def loss_at_the_end(folder):
        pipe = DiffusionPipeline.from_pretrained(folder)
        noise = torch.randn(len(images), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x_0 = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
            text = pipe.encode_prompt(captions, "cpu", 1, False)[0]
            return v_loss(pipe.unet(noise, 999, text).sample, -x_0).mean().item()

    run(
        {**options, "pretrained_model_name_or_path": str(tmp_path / "base"), "train_data_dir": str(data)},
        max_train_steps=150,
        train_batch_size=8,
        learning_rate=2e-3,
        ema_decay=0.9,
        checkpointing_steps=150,
    )
    assert loss_at_the_end(options["output_dir"]) < 0.7 * loss_at_the_end(tmp_path / "base")


def test_moving_average_is_what_is_saved(options, tmp_path):
    averaged = run(options)
    plain = run(options, ema_decay=0.0, output_dir=str(tmp_path / "plain"))
    last = load_file(list_checkpoints(Path(options["output_dir"]))[-1] / "unet.safetensors")
    assert same(last, plain)
    assert not same(averaged, plain)


def test_previews_checkpoints_logs_and_configuration_are_written(options):
    prompts = ["a black landscape", "a white landscape"]
    run(options, validation_prompts=prompts, validation_steps=2, report_to="tensorboard", checkpoints_total_limit=1)
    folder = Path(options["output_dir"])
    previews = sorted(path.name for path in (folder / "previews").iterdir())
    assert previews == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-000004"]
    assert not list(folder.glob(".*partial"))
    assert len(losses(folder)) == 4
    written = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert TrainingConfig(**written).validation_prompts == prompts


def test_a_progress_display_of_the_caller_hears_of_every_step_in_place_of_a_bar(options, capsys):
    seen = []
    train(TrainingConfig(**{**options, "max_train_steps": 2}), on_step=seen.append)
    train(TrainingConfig(**{**options, "resume": True}), on_step=seen.append)
    assert seen == [0, 1, 2, 2, 3, 4]
    assert "training:" not in capsys.readouterr().err


def test_previews_are_sampled_as_shipped(options, monkeypatch):
    from zsnr_diffusers import ZeroSNRStableDiffusionPipeline

    seen, call = [], ZeroSNRStableDiffusionPipeline.__call__

    def spy(self, *args, **kwargs):
        guidance = self.default_guidance_rescale, self.default_keep_low_frequencies
        seen.append((self.scheduler, guidance, kwargs.get("guidance_rescale")))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ZeroSNRStableDiffusionPipeline, "__call__", spy)
    run(options, validation_prompts=["snow"], guidance_rescale=0.6, max_train_steps=1)
    ((scheduler, guidance, changed),) = seen
    shipped = DiffusionPipeline.from_pretrained(options["output_dir"]).scheduler
    assert (guidance, changed) == ((0.6, 4), None)
    assert type(scheduler) is type(shipped)
    assert scheduler.config.timestep_spacing == shipped.config.timestep_spacing == "trailing"


@pytest.mark.full
@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}, {"train_batch_size": 1}]
)
def test_variants_run_and_stay_finite(options, changes):
    if changes.get("mixed_precision"):
        changes = {**changes, "validation_prompts": ["snow"]}
    assert all(bool(value.isfinite().all()) for value in run(options, **changes).values())
    assert all(value.dtype == torch.float32 for value in weights(options["output_dir"]).values())


@pytest.mark.full
def test_base_from_the_hub(options, base_folder, tmp_path):
    """The Hub's place is taken by a server on this machine; what talks to it is the real client."""
    with serve({"acme/base": base_folder}) as endpoint:
        result = subprocess.run(
            [sys.executable, *command(options, pretrained_model_name_or_path="acme/base", max_train_steps=1)],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    folder = Path(options["output_dir"])
    assert "base_model: acme/base" in (folder / "README.md").read_text()
    vae = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (folder / vae).read_bytes() == (base_folder / vae).read_bytes()
    assert not (folder / vae).is_symlink()


# -- what goes wrong


def test_the_log_goes_on_to_the_error(options, monkeypatch):
    from zsnr_diffusers.training import trainer

    steps = itertools.count()

    def loss_that_breaks(output, target):
        return (output - target).square().flatten(1).mean(1) * (float("nan") if next(steps) == 2 else 1)

    monkeypatch.setattr(trainer, "v_loss", loss_that_breaks)
    with pytest.raises(TrainingError, match="step 3"):
        run(options, report_to="tensorboard")
    assert len(losses(options["output_dir"])) == 2


def test_folder_of_another_run_is_refused_and_resume_cannot_change_the_run(options):
    run(options)
    with pytest.raises(ValueError, match=r"already contains a run: pass --resume"):
        run(options)
    with pytest.raises(ValueError, match=r"--seed was 0 and is now 5"):
        run(options, resume=True, seed=5)
    longer = run(options, resume=True, max_train_steps=6, learning_rate=1e-4)
    assert longer
    assert list_checkpoints(Path(options["output_dir"]))[-1].name == "checkpoint-000006"


def test_resume_without_a_checkpoint_starts(options):
    assert run(options, resume=True, max_train_steps=1)


def test_output_folder_that_is_a_file_is_refused(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(options, output_dir=str(tmp_path / "file"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do float16")
def test_float16_on_a_cpu_is_refused_at_once(options):
    with pytest.raises(ValueError, match=r"--mixed_precision=fp16 needs a GPU; .* bf16"):
        run(options, mixed_precision="fp16")


def test_dry_run_prints_configuration_and_plan_and_writes_nothing(options, capsys):
    train(TrainingConfig(**{**options, "dry_run": True, "gradient_accumulation_steps": 3}))
    text = capsys.readouterr().out
    told = yaml.safe_load(text.split("\n\n")[0])
    assert told["gradient_accumulation_steps"] == 3
    assert TrainingConfig(**told) == TrainingConfig(**{**options, "dry_run": True, "gradient_accumulation_steps": 3})
    assert "ema_warmup" not in told  # at its default
    assert re.search(r"SNR at the last timestep: 0\.004682 -> 0\n", text)
    assert "6 = 2 x 3 forward passes x 1 processes" in text
    assert "EulerDiscreteScheduler, trailing" in text
    assert not Path(options["output_dir"]).exists()


def test_the_plan_is_a_table_on_a_terminal(options, monkeypatch):
    screen = on_terminal(monkeypatch, 60, lambda: train(TrainingConfig(**{**options, "dry_run": True})))
    lines = screen.text.split("\n\n")[1].splitlines()
    assert lines[0].split() == ["training"]
    assert BOX in lines[1]
    assert "SNR at the last timestep  0.004682 -> 0" in [line.rstrip() for line in lines]
    assert max(map(len, lines)) <= 60


@pytest.mark.full
def test_errors_end_the_command_with_one_line(options):
    result = subprocess.run(
        [sys.executable, *command(options, train_data_dir="/nowhere")], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "error: image folder '/nowhere' does not exist" in result.stderr
    assert "Traceback" not in result.stderr

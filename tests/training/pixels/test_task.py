import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion, tiny_unet
from training_runs import same, trained

from zsnr_diffusers import ClassConditionalPipeline, load_pipeline
from zsnr_diffusers.training import RECIPES, PixelTrainingConfig, train
from zsnr_diffusers.training.data.held_out import draw_rows
from zsnr_diffusers.training.pixels import PixelTask
from zsnr_diffusers.training.reporting.luminance import read_luminance_file
from zsnr_diffusers.training.reporting.validation_loss import read_validation_loss


def run(options, **changes):
    return trained(PixelTrainingConfig(**{**options, **changes}))


RECIPE = {
    name: value
    for name, value in RECIPES["cifar10-ddpm"].items()
    if name not in ("unet", "resolution", "dropout", "train_batch_size", "max_train_steps", "checkpointing_steps")
}


def test_the_recipe_is_that_of_ho_et_al(options):
    """Written out in plain torch: linear betas, epsilon, Adam, warm-up, gradient norm, a constant moving average."""
    options |= RECIPE | {"class_column": None, "max_train_steps": 6, "dropout": 0.0, "lr_warmup_steps": 4}
    options |= {"ema_decay": 0.9, "learning_rate": 1e-2}  # so that six steps show
    config = PixelTrainingConfig(**options)
    trained = run(options)

    task = PixelTask(config)
    unet, samples = task.unet.train(), task.samples(range(12))
    averaged = [parameter.detach().clone() for parameter in unet.parameters()]
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    adam = torch.optim.Adam(unet.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(6):
        batch = [samples[2 * step + i] for i in range(2)]
        x, noise, t = (torch.stack([one[key] for one in batch]) for key in ("pixel_values", "noise", "timestep"))
        signal = torch.tensor(alpha_bar[t], dtype=torch.float32)[:, None, None, None]
        loss = F.mse_loss(unet(signal.sqrt() * x + (1 - signal).sqrt() * noise, t).sample, noise)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * min(step / 4, 1)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        for mean, parameter in zip(averaged, unet.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - 0.9)
    names = [name for name, _ in unet.named_parameters()]
    moved = max(float((mean - first).abs().max()) for mean, first in zip(averaged, task_start(config), strict=True))
    assert moved > 1e-3
    for name, mean in zip(names, averaged, strict=True):
        # Adam divides by the root of a gradient's square, so float32's last digit may grow; steps are of size 1e-2
        torch.testing.assert_close(trained[name], mean, rtol=0, atol=1e-4, msg=name)


def task_start(config):
    return [parameter.detach() for parameter in PixelTask(config).unet.parameters()]


@pytest.mark.full
@pytest.mark.parametrize("column", [None, "label"])
def test_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path, column):
    options["class_column"] = column
    whole = run(options, output_dir=str(tmp_path / "whole"))
    run(options, max_train_steps=2)
    assert same(run(options, resume=True), whole)


@pytest.mark.full
def test_training_lowers_the_loss_and_tells_classes_apart(options, tmp_path):
    """Three classes, each of one grey: after training, the network generates the grey that is asked for."""
    for i, grey in enumerate((20, 128, 235)):
        (tmp_path / "greys" / str(i)).mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(tmp_path / "greys" / str(i) / "0.png")
    run(
        options,
        train_data_dir=str(tmp_path / "greys"),
        in_channels=1,
        train_batch_size=16,
        max_train_steps=150,
        checkpointing_steps=150,
        learning_rate=2e-3,
        ema_decay=0.9,
        lr_scheduler="cosine",
    )
    pipe = load_pipeline(options["output_dir"])
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1, 2], num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    greys = [float(np.asarray(image).mean()) for image in images]
    # 150 steps leave a shade open; the classes' greys are over 100 apart
    assert greys == pytest.approx([20, 128, 235], abs=50)


def test_previews_show_a_row_per_class(options):
    run(options, validation_images=2, validation_steps=2, num_inference_steps=2)
    previews = sorted(Path(options["output_dir"], "previews").iterdir())
    assert [path.name for path in previews] == ["step-000002.png", "step-000004.png"]
    with Image.open(previews[0]) as picture:
        assert picture.height == 3 * (8 + 4) + 4


@pytest.mark.parametrize("classes", [False, True])
def test_goes_on_from_a_pipeline_on_its_own_schedule(options, tmp_path, classes):
    unet = tiny_unet(num_class_embeds=4 if classes else None)
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    (ClassConditionalPipeline if classes else DDPMPipeline)(unet, cosine).save_pretrained(tmp_path / "base")
    trained = run(
        options,
        pretrained_model_name_or_path=str(tmp_path / "base"),
        class_column="label" if classes else None,
        learning_rate=1e-6,
    )
    for name, value in unet.state_dict().items():
        assert (trained[name] - value).abs().max() < 1e-5
    shipped = load_pipeline(options["output_dir"]).scheduler.config
    assert (shipped.beta_schedule, shipped.rescale_betas_zero_snr) == ("squaredcos_cap_v2", True)


def test_dry_run_prints_the_network_of_the_paper(capsys, options):
    train(PixelTrainingConfig.from_recipe("cifar10-ddpm", **(options | RECIPE_AS_PUBLISHED), dry_run=True))
    text = capsys.readouterr().out
    assert "ddpm-cifar10, new, 35,746,307 parameters, 3 channels" in text
    assert re.search(r"SNR at the last timestep: 4\.036e-05\n", text)
    assert "128 = 128 x 1 forward passes" in text
    assert "DDPMScheduler, leading" in text
    assert not Path(options["output_dir"]).exists()


RECIPE_AS_PUBLISHED = dict(RECIPES["cifar10-ddpm"]) | {"class_column": None}


@pytest.mark.full
@pytest.mark.parametrize("data", [True, False])
def test_measuring_says_how_long_it_would_take_and_writes_nothing(options, capsys, data):
    if not data:
        options["train_data_dir"] = None
    train(PixelTrainingConfig(**{**options, "dry_run": True, "measure": True, "max_train_steps": 36_000}))
    text = capsys.readouterr().out
    speed, seconds, hours = map(
        float, re.search(r"measured: ([\d.]+) images/s, ([\d.]+) s per step.* take ([\d.]+) hours", text).groups()
    )
    assert speed == pytest.approx(2 / seconds, rel=0.05)
    assert hours == pytest.approx(10 * seconds, abs=0.06)
    assert not Path(options["output_dir"]).exists()


@pytest.mark.full
def test_as_a_command(options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    script = Path(__file__).parents[3] / "examples" / "train_unconditional.py"
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "12 images of 3 classes at 8 x 8" in result.stdout


# -- bad input


def test_pipelines_that_are_not_of_pixels_are_refused(options, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, not a pixel-space pipeline"):
        run(options, pretrained_model_name_or_path=str(tmp_path / "latent"))
    with pytest.raises(OSError, match="no/such-model"):
        run(options, pretrained_model_name_or_path="no/such-model")


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({"num_class_embeds": 11}, {}, "The data has 3 classes, the network has 10"),
        ({"num_class_embeds": 4}, {"class_column": None}, "num_class_embeds=4: set the classes' column"),
        ({}, {}, "num_class_embeds=None: leave out --class_column"),
        ({"out_channels": 6}, {"class_column": None}, "makes 6 channels from 3"),
        ({}, {"class_column": None, "resolution": 16}, r"--resolution=16 is not the sample_size=8"),
    ],
)
def test_networks_that_do_not_fit_are_refused(options, tmp_path, network, changes, message):
    DDPMPipeline(tiny_unet(**network), DDPMScheduler()).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        run(options, pretrained_model_name_or_path=str(tmp_path / "base"), **changes)
    assert not Path(options["output_dir"]).exists()


def test_data_that_does_not_fit_is_refused(options):
    with pytest.raises(ValueError, match="sample_size=9 must be a multiple of 2"):
        run(options, resolution=9)
    with pytest.raises(ValueError, match=r"has the columns .*; --class_column='species' is not one"):
        run(options, class_column="species")


@pytest.mark.full
def test_brightness_is_painted_by_the_classes_of_rows_and_a_new_network_has_no_before(options, monkeypatch, tmp_path):
    labels, choose = [], ClassConditionalPipeline._resolve_labels

    def spy(self, class_labels, batch_size, guidance_scale):
        labels.extend(class_labels or [None] * batch_size)
        return choose(self, class_labels, batch_size, guidance_scale)

    monkeypatch.setattr(ClassConditionalPipeline, "_resolve_labels", spy)
    options |= {"luminance_images": 11, "validation_steps": 2, "num_inference_steps": 1}
    run(options)
    rows = draw_rows(range(12), 0, 11, 5)
    assert labels == 2 * [row // 4 for row in rows]
    assert list(read_luminance_file(Path(options["output_dir"]))) == [2, 4]
    labels.clear()
    base = tmp_path / "base"
    DDPMPipeline(tiny_unet(in_channels=1, out_channels=1), DDPMScheduler()).save_pretrained(base)
    options |= {"class_column": None, "pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / "on")}
    run(options)
    assert labels == 3 * 11 * [None]
    assert list(read_luminance_file(Path(options["output_dir"]))) == [0, 2, 4]


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_column": None}, {"prediction_type": "flow_prediction"}, {"loss_weighting": "learned_uncertainty"}],
)
def test_validation_loss_is_of_whole_classes_and_unmirrored_images(options, changes):
    options |= {"validation_rows": 5, "validation_loss_steps": 2, "class_dropout": 1.0, "random_flip": True, **changes}
    run(options)
    found = read_validation_loss(Path(options["output_dir"]))
    assert list(found) == [0, 2, 4]
    config = PixelTrainingConfig(**options)
    task, held_out = PixelTask(config), draw_rows(range(12), 0, 5, 8)
    samples = task.samples(range(12), 1, sorted(held_out))
    unet, losses = task.unet.eval(), []
    timesteps = task.objective.fixed_timesteps()
    assert timesteps.tolist() == [*range(50, 1000, 100), 1000 if config.is_flow else 999]
    for row in sorted(held_out):
        batch = {name: value[None] for name, value in samples.validation_sample(row).items()}
        if task.classes:
            assert batch["class_labels"].item() == row // 4
        with torch.no_grad():
            losses += [_loss(task, unet, batch, timestep[None]) for timestep in timesteps[[0, -1]]]
    first, last = sum(losses[::2]) / 5, sum(losses[1::2]) / 5
    assert (found[0]["t050"], found[0]["last"]) == pytest.approx((first, last), rel=1e-5)


def _loss(task, unet, batch, timestep):
    """By the formulas of v and of flow matching, without the objective's own."""
    x_0, noise = batch["pixel_values"], batch["noise"]
    if task.config.is_flow:
        s = timestep / 1000
        x_t, target = (1 - s) * x_0 + s * noise, noise - x_0
    else:
        level = task.schedule.noise_level(timestep, like=x_0)
        x_t = level.alpha * x_0 + level.sigma * noise
        target = level.alpha * noise - level.sigma * x_0
    output = unet(x_t, timestep, batch.get("class_labels")).sample
    return (output - target).square().mean().item()

"""The loss on rows that are kept aside: what it is of, and that it is the same however a run is made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from child_processes import exit_code, start_ranks
from diffusers import DiffusionPipeline
from training_runs import logged, same, trained

from zsnr_diffusers.core import v_loss
from zsnr_diffusers.schedulers import ZeroSNRDDPMScheduler
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.data.held_out import hold_out_rows
from zsnr_diffusers.training.fsdp import CAN_SHARD_ON_CPU
from zsnr_diffusers.training.objective import BridgedObjective, Objective
from zsnr_diffusers.training.reporting.validation_loss import (
    ValidationLoss,
    add_validation_loss,
    read_validation_loss,
)
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

ROWS = 3


@pytest.fixture
def options(options):
    return {
        **options,
        "validation_rows": ROWS,
        "validation_loss_steps": 2,
        "report_to": "tensorboard",
        "ema_decay": 0.5,
    }


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


def measured(options):
    return read_validation_loss(Path(options["output_dir"]))


def without_training(losses):
    """What does not depend on how a global batch is summed."""
    return {name: value for name, value in losses.items() if name != "training"}


def samples_of(options, **changes):
    task = StableDiffusionTask(TrainingConfig(**{**options, **changes}))
    images = check_images(task.rows, task.config, progress=False)
    return task, task.samples(images, 1, hold_out_rows(task.rows, images, task.config, ROWS))


def by_hand(folder, options):
    """The same losses of a pipeline, one forward pass for each row and timestep."""
    task, samples = samples_of(options)
    pipe, found = DiffusionPipeline.from_pretrained(folder), {}
    timesteps = {f"t{t:03d}": t for t in range(50, 1000, 100)} | {"last": 999}
    with torch.no_grad():
        for row in samples.held_out:
            sample = {name: value[None] for name, value in samples.validation_sample(row).items()}
            moments = pipe.vae.encode(sample["pixel_values"] / 127.5 - 1).latent_dist
            x_0 = (moments.mean + moments.std * sample["posterior_noise"]) * pipe.vae.config.scaling_factor
            text = pipe.encode_prompt([task.rows[row]["text"]], "cpu", 1, False)[0]
            for name, t in timesteps.items():
                level = task.schedule.noise_level(torch.tensor([t]), like=x_0)
                x_t = level.alpha * x_0 + level.sigma * sample["noise"]
                target = level.alpha * sample["noise"] - level.sigma * x_0
                loss = v_loss(pipe.unet(x_t, t, text).sample, target).item()
                found[name] = found.get(name, 0) + loss / len(samples.held_out)
    return found | {"mean": sum(found[f"t{t:03d}"] for t in range(50, 1000, 100)) / 10}


def test_it_is_the_loss_of_what_is_saved_on_rows_that_are_not_trained_on(options, base_folder):
    run(options)
    found = measured(options)
    assert list(found) == [0, 2, 4]
    assert "training" not in found[0]
    assert found[4]["training"] > 0
    for step, folder in ((0, base_folder), (4, options["output_dir"])):
        assert without_training(found[step]) == pytest.approx(by_hand(folder, options), rel=2e-5)
    scalars = logged(options["output_dir"])
    assert scalars["validation_loss"] == [(step, pytest.approx(one["mean"])) for step, one in found.items()]
    assert scalars["validation_loss/last"][-1] == (4, pytest.approx(found[4]["last"]))
    assert Path(options["output_dir"], "validation_loss.png").stat().st_size > 10_000
    card = Path(options["output_dir"], "README.md").read_text()
    assert f"kept aside: {found[0]['mean']:.4g} before training, {found[4]['mean']:.4g} after it" in card


def test_training_is_bit_for_bit_that_without(options, image_folder, tmp_path):
    """Whether it is measured often or not, and as on data in which the rows that are kept aside never were."""
    task, samples = samples_of(options)
    weights = run(options, validation_loss_steps=1)
    assert same(weights, run(options, validation_loss_steps=1000, output_dir=str(tmp_path / "seldom")))
    held_out = {Path(task.rows[row]["image"]["path"]).name for row in samples.held_out}
    shutil.copytree(image_folder, tmp_path / "rest", ignore=lambda *_: held_out)
    metadata = [line for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    kept = [line for line in metadata if json.loads(line)["file_name"] not in held_out]
    (tmp_path / "rest" / "metadata.jsonl").write_text("\n".join(kept))
    rest = {"train_data_dir": str(tmp_path / "rest"), "validation_rows": None, "output_dir": str(tmp_path / "without")}
    assert same(weights, run(options, **rest))
    assert measured({"output_dir": str(tmp_path / "without")}) == {}


def test_rows_are_the_same_whatever_else_changes(options):
    _, samples = samples_of(options)
    assert len(samples.held_out) == ROWS
    assert not set(samples.held_out) & set(samples.usable_rows)
    assert len(samples.usable_rows) == 10 - ROWS == samples.epoch_length
    varied = {"caption_dropout": 1.0, "random_flip": True, "random_crop": True, "shuffle_tags": True}
    _, others = samples_of(options, **varied, cache="none")
    assert others.held_out == samples.held_out
    for row in samples.held_out:
        a, b = (one.validation_sample(row) for one in (samples, others))
        assert all(torch.equal(a[name], b[name]) for name in a)
    _, reseeded = samples_of(options, seed=1)
    assert reseeded.held_out != samples.held_out


@pytest.mark.full
def test_with_caches_and_other_batches_it_is_the_same(options, tmp_path):
    run(options, cache="none", max_train_steps=1)
    uncached = measured(options)[0]
    for number, changes in enumerate(({"cache": "both"}, {"train_batch_size": 1}, {"gradient_checkpointing": True})):
        options["output_dir"] = str(tmp_path / f"{number}")
        run(options, max_train_steps=1, **{"cache": "none", **changes})
        # What is stored was computed in batches of other sizes, whose kernels round otherwise.
        exact = "cache" not in changes
        assert measured(options)[0] == (uncached if exact else pytest.approx(uncached, rel=1e-5))


@pytest.mark.full
def test_a_run_that_was_interrupted_measures_the_same(options, tmp_path):
    run(options)
    whole = measured(options)
    options["output_dir"] = str(tmp_path / "cut")
    run(options, max_train_steps=2)
    run(options, resume=True)
    # Its learning rate has the same warm-up, so what it measures at step 2 is the same as well.
    assert measured(options) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_rows": 0}, r"--validation_rows=0 must be above 0"),
        ({"validation_rows": 10}, r"--validation_rows=10 of 10 rows leaves none to train on: lower it, or leave"),
        ({"validation_rows": 3, "validation_loss_steps": 0}, r"--validation_loss_steps=0 must be above 0"),
    ],
)
def test_what_cannot_be_kept_aside_is_refused_before_any_work(options, changes, message):
    with pytest.raises(ValueError, match=message):
        train(TrainingConfig(**{**options, **changes}))
    assert not any(Path(options["output_dir"]).glob("*.yaml"))


@pytest.mark.full
def test_other_rows_are_another_run(options):
    run(options)
    with pytest.raises(ValueError, match=r"--validation_rows was 3 and is now 4"):
        run(options, validation_rows=4, resume=True)


def test_the_plan_says_it(options, capsys):
    train(TrainingConfig(**options, dry_run=True))
    said = capsys.readouterr().out
    assert "loss on 3 images that are kept aside, every 2 steps" in said
    assert "7 images at" in said


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4},
        {"prediction_type": "flow_prediction"},
        {"mixed_precision": "bf16", "cache": "none"},
        {"aspect_ratio_buckets": True, "validation_rows": 5},
    ],
)
def test_it_is_measured_whatever_is_trained(options, shapes_folder, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    if "aspect_ratio_buckets" in changes:
        changes = {**changes, "train_data_dir": str(shapes_folder), "resolution": 64}
    train(TrainingConfig(**{**options, **changes, "max_train_steps": 2}))
    found = measured(options)
    assert list(found) == [0, 2]
    assert all(0 < value < 10 for losses in found.values() for value in losses.values())
    assert found[0] != without_training(found[2])


@pytest.mark.full
def test_a_loss_that_is_not_finite_ends_no_run(options, monkeypatch, capsys):
    measure = ValidationLoss.measure
    monkeypatch.setattr(ValidationLoss, "measure", lambda self: measure(self) * float("nan"))
    run(options, max_train_steps=1)
    assert "step 1: validation loss nan, nan at the last timestep; not written down" in capsys.readouterr().out
    assert measured(options) == {}
    assert "kept aside" not in Path(options["output_dir"], "README.md").read_text()


@pytest.mark.parametrize("objective", [Objective, BridgedObjective])
def test_the_fixed_timesteps_end_at_pure_noise(objective):
    """Also through a bridge, whose timesteps are those of a flow: 1000 is flow time 1."""
    schedule = ZeroSNRDDPMScheduler(prediction_type="v_prediction")
    asked_of, timesteps = objective(schedule), objective(schedule).fixed_timesteps()
    bridged = objective is BridgedObjective
    assert timesteps.tolist() == [*range(50, 1000, 100), 1000 if bridged else 999]
    x_0, noise = (torch.randn(11, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    asked = asked_of.noised_batch(x_0, noise, timesteps)
    assert torch.equal(asked.x_t[-1], noise[-1])
    assert asked.timestep[-1] == 999
    true_v = schedule.get_velocity(x_0, noise, torch.arange(1000)[-1:].expand(11))[-1:]
    at_the_end = asked_of.noised_batch(x_0[-1:], noise[-1:], timesteps[-1:])
    torch.testing.assert_close(at_the_end.convert_output(true_v), at_the_end.target)
    assert torch.equal(at_the_end.target, noise[-1:] - x_0[-1:] if bridged else -x_0[-1:])


@pytest.mark.parametrize("damaged", ["", "[]", '{"0": 1}', '{"x": {"mean": 1}}'])
def test_a_damaged_file_begins_anew(tmp_path, damaged):
    (tmp_path / "validation_loss.json").write_text(damaged)
    assert read_validation_loss(tmp_path) == {}
    for step in (0, 5, 10, 5):
        add_validation_loss(tmp_path, step, {"mean": 0.5, "last": 1.0})
    assert list(read_validation_loss(tmp_path)) == [0, 5]


@pytest.mark.full
@pytest.mark.parametrize(
    "changes", [{}, {"ema_device": "cpu"}, pytest.param({"sharding": "parameters"}, marks=pytest.mark.skipif(
        not CAN_SHARD_ON_CPU, reason="this torch shards on GPUs alone"))]
)  # fmt: skip
def test_two_processes_measure_what_one_does(options, tmp_path, changes):
    run(options, max_train_steps=2)
    alone = measured(options)
    options |= {"train_batch_size": 1, "output_dir": str(tmp_path / "two"), "max_train_steps": 2, **changes}
    ranks = start_ranks(options, tmp_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank0.log").read_text()
    assert without_training(measured(options)[0]) == without_training(alone[0])
    # After two steps the weights differ, as gradients were added in another order.
    assert measured(options)[2] == pytest.approx(alone[2], rel=1e-5)

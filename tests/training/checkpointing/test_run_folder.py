import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.checkpointing import run_folder
from zsnr_diffusers.training.checkpointing.fingerprint import compute_fingerprint
from zsnr_diffusers.training.checkpointing.lock import LOCK_FILE
from zsnr_diffusers.training.config import OutputConfig
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask


@pytest.fixture
def options(options, base_folder, image_folder, tmp_path):
    """With base and data to change."""
    return {
        **options,
        "pretrained_model_name_or_path": str(shutil.copytree(base_folder, tmp_path / "base")),
        "train_data_dir": str(shutil.copytree(image_folder, tmp_path / "images")),
        "max_train_steps": 1,
    }


def run(options, **changes):
    train(TrainingConfig(**{**options, **changes}))


def another_size(folder):
    file = min(folder.glob("*.png"))
    file.write_bytes(file.read_bytes() + b" ")


def another_name(folder):
    lines = (folder / "metadata.jsonl").read_text()
    file = min(folder.glob("*.png"))
    file.rename(folder / "renamed.png")
    (folder / "metadata.jsonl").write_text(lines.replace(file.name, "renamed.png"))


def another_caption(folder):
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("black", "pitch-black"))


def one_less(folder):
    file = folder / "metadata.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    min(folder.glob("*.png")).unlink()


@pytest.mark.full
@pytest.mark.parametrize("change", [another_size, another_name, another_caption, one_less])
def test_changed_data_is_refused_unless_forced(options, change):
    run(options)
    change(Path(options["train_data_dir"]))
    with pytest.raises(ValueError, match=r"another run: the data was .*'rows': 10, .* and is now .*--force"):
        run(options, resume=True)
    run(options, resume=True, force=True)
    run(options, resume=True)  # what was forced is the run now


def test_data_that_are_the_same_elsewhere_are_the_same(options, tmp_path):
    """A folder is copied, its files get new dates and a new place."""
    task = StableDiffusionTask(TrainingConfig(**options))
    copy = shutil.copytree(options["train_data_dir"], tmp_path / "copy", copy_function=shutil.copyfile)
    other = StableDiffusionTask(TrainingConfig(**{**options, "train_data_dir": str(copy)}))
    rows = list(range(len(task.rows)))
    assert compute_fingerprint(task, rows) == compute_fingerprint(other, rows)
    assert compute_fingerprint(task, rows[:-1])["data"]["rows"] == len(rows) - 1


def test_images_within_the_table_count_by_name_and_size(options):
    task = StableDiffusionTask(TrainingConfig(**options))
    rows = list(range(len(task.rows)))
    before = compute_fingerprint(task, rows)["data"]

    def embed(row):
        path = row["image"]["path"]
        return {"image": {"path": Path(path).name, "bytes": Path(path).read_bytes()}}

    task.rows = task.rows.map(embed)
    assert compute_fingerprint(task, rows)["data"] == before


@pytest.mark.full
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_changed_base_is_refused_unless_forced(options, part):
    run(options)
    (file,) = Path(options["pretrained_model_name_or_path"], part).glob("*.safetensors")
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = torch.nextafter(weights[name], torch.tensor(10.0))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"another run: the base, {part} was .* and is now .*--force"):
        run(options, resume=True)
    run(options, resume=True, force=True)


def test_a_changed_schedule_is_refused_unless_forced(options):
    run(options)
    file = Path(options["pretrained_model_name_or_path"], "scheduler", "scheduler_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.02}))
    with pytest.raises(ValueError, match=r"another run: the schedule was .*0.012.* and is now .*0.02.*--force"):
        run(options, resume=True)


def test_another_option_is_refused_unless_forced_and_another_learning_rate_is_fine(options):
    run(options)
    with pytest.raises(ValueError, match=r"--seed was 0 and is now 1\. Choose another --output_dir, or .* --force"):
        run(options, resume=True, seed=1)
    run(options, resume=True, seed=1, force=True, max_train_steps=2)
    run(options, resume=True, seed=1, learning_rate=1e-5, max_train_steps=3)


def test_force_is_not_written(options):
    run(options, resume=True, force=True)
    assert yaml.safe_load(Path(options["output_dir"], run_folder.CONFIG_FILE).read_text())["force"] is False


def test_a_refusal_leaves_the_folder_as_it_was(options, tmp_path):
    options |= {"cache_dir": str(tmp_path / "cache")}  # where is noted what was found in the changed image
    run(options)
    folder = Path(options["output_dir"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    another_size(Path(options["train_data_dir"]))
    with pytest.raises(ValueError, match="another run"):
        run(options, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_checkpoints_is_not_trained_over(options):
    run(options)
    shutil.rmtree(Path(options["output_dir"], "checkpoint-000001"))
    with pytest.raises(ValueError, match="contains a finished run without a checkpoint"):
        run(options, resume=True)


@pytest.mark.parametrize("text", ["a: [", "- 1", "x"])
def test_a_damaged_configuration_is_named(options, text):
    run(options)
    Path(options["output_dir"], run_folder.CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"training_config.yaml cannot be read; restore a good copy or remove it"):
        run(options, resume=True)


Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize(("limit", "there", "missing"), [(2, 0, 3), (2, 1, 2), (2, 3, 1), (2, 5, 1), (1, 0, 2)])
def test_room_is_asked_for_the_checkpoints_that_are_missing_and_one_being_written(
    tmp_path, monkeypatch, limit, there, missing
):
    for step in range(1, there + 1):
        (tmp_path / f"checkpoint-{step:06}").mkdir()
    config = OutputConfig(output_dir=str(tmp_path), checkpoints_total_limit=limit)
    size, asked = 1_500_000_000, []

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or Disk(0, 0, free))

    disk(missing * size)
    run_folder.check_disk_space(config, size)
    disk(missing * size - 10_000_000)
    with pytest.raises(ValueError, match="are free") as refused:
        run_folder.check_disk_space(config, size)
    assert str(refused.value) == (
        f"--output_dir={tmp_path} needs {1.5 * missing:.2f} GB, for {missing} more checkpoints of 1.50 GB, and "
        f"{1.5 * missing - 0.01:.2f} GB are free: free some space, choose another folder, or lower "
        f"--checkpoints_total_limit={limit}."
    )
    assert asked == [tmp_path, tmp_path]


@pytest.mark.full
@pytest.mark.parametrize(("limit", "ema", "copies"), [(2, 0.999, 3 * 4), (1, 0.0, 2 * 3)])
def test_disk_space_is_checked_before_the_first_step(options, monkeypatch, limit, ema, copies):
    tensors = [*StableDiffusionTask(TrainingConfig(**options)).unet.parameters()]
    step_counts = 4 * len(tensors) * (limit + 1)  # of the optimizer
    needed = 4 * sum(p.numel() for p in tensors) * copies + step_counts
    options |= {"checkpoints_total_limit": limit, "ema_decay": ema}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, needed - 1))
    with pytest.raises(ValueError, match=r"needs 0\.\d\d GB, for \d more checkpoints .* are free: free some space"):
        run(options)
    assert not Path(options["output_dir"], run_folder.CONFIG_FILE).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, needed))
    run(options)
    # what the checkpoint takes that is there by now is not needed again
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, needed * limit // (limit + 1)))
    run(options, resume=True, max_train_steps=2)


def test_a_folder_that_is_in_use_is_refused(options):
    Path(options["output_dir"]).mkdir()
    Path(options["output_dir"], LOCK_FILE).write_text("1 on elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsnr_diffusers.training.checkpointing.lock.fcntl", None)
        with pytest.raises(ValueError, match="is in use by process 1 on elsewhere"):
            run(options)
        run(options, dry_run=True)  # which writes nothing


@pytest.mark.parametrize(
    ("option", "what"), [("pretrained_model_name_or_path", "base model"), ("train_data_dir", "data")]
)
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_the_folder_of_the_base_or_of_the_data_is_not_written_into(options, tmp_path, option, what, linked, resume):
    folder = Path(options[option])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    if linked:
        (tmp_path / "link").symlink_to(folder)
    output = str(tmp_path / "link") if linked else f"{folder}/"
    with pytest.raises(ValueError, match=rf"^--output_dir=.* is the folder of the {what}, --{option}=.*: choose"):
        run(options, output_dir=output, resume=resume)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"lr_warmup_steps": 8}, "12%"),
        ({"lr_warmup_steps": 1}, "100%"),
        ({"lr_warmup_steps": 8, "lr_scheduler": "constant"}, None),
        ({"lr_warmup_steps": 0}, None),
        ({"lr_warmup_steps": None}, None),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_named_before_it_starts(options, changes, share, capsys):
    run(options, dry_run=True, **changes)
    said = capsys.readouterr().out
    assert ("warning: --lr_warmup_steps=" in said) == (share is not None)
    assert share is None or f"the learning rate ends at {share} of 0.001" in said

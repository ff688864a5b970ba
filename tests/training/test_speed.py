"""Options that make steps faster or smaller: the same training, the same files."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from training_runs import logged, same, trained, weights

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, optimizers, speed, train, trainer
from zsnr_diffusers.training.reporting.validation import ValidationLogger
from zsnr_diffusers.training.speed import check_speed, copy_with_strides_of
from zsnr_diffusers.training.stable_diffusion.architectures import StableDiffusion

CHANGES = {
    "channels_last": {"channels_last": True},
    "blocks": {"compile": "blocks"},
    "network": {"compile": "network"},
}


@pytest.fixture
def run_options(options):
    return {**options, "report_to": "tensorboard", "max_train_steps": 4, "validation_prompts": ["snow"]}


@pytest.fixture
def _graphs(monkeypatch):
    """Compiled to what torch has of itself: the graphs of inductor, without the minutes of its compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def losses(folder):
    return [value for _, value in logged(folder)["loss"]]


def checkpoint(folder, step):
    files = Path(folder, f"checkpoint-{step:06d}").glob("*.safetensors")
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def resumed(folder, copy, config):
    """The run again from its checkpoint at step 2 on."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-000004")
    trained(TrainingConfig(**{**config, "output_dir": str(copy), "resume": True}))
    return checkpoint(copy, 4)


def check(options, tmp_path, changes, tolerance):
    """The run with an option: as without, under the same names, and bit for bit from a checkpoint on."""
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    trained(TrainingConfig(**{**options, "output_dir": str(plain)}))
    trained(TrainingConfig(**{**options, **changes, "output_dir": str(fast)}))
    assert losses(fast) == pytest.approx(losses(plain), rel=tolerance)
    a, b = checkpoint(fast, 4), checkpoint(plain, 4)
    assert {name: value.shape for name, value in a.items()} == {name: value.shape for name, value in b.items()}
    assert weights(fast).keys() == weights(plain).keys()
    assert same(resumed(fast, tmp_path / "again", {**options, **changes}), a)


@pytest.mark.full
@pytest.mark.usefixtures("_graphs")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of its own inputs
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(value, id=name, marks=pytest.mark.slow if name == "network" else ())
        for name, value in CHANGES.items()
    ],
)
def test_training_is_what_it_is_without(run_options, tmp_path, changes):
    """Sums in another order; float32 keeps seven digits, and Adam divides small gradients by themselves."""
    check(run_options, tmp_path, changes, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch, of its own compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("changes", [{"compile": "blocks"}, {"compile": "network", "channels_last": True}])
def test_training_by_the_compiler_is_what_it_is_without(run_options, tmp_path, changes):
    torch._dynamo.reset()
    check(run_options, tmp_path, changes, tolerance=1e-4)


@pytest.mark.full
@pytest.mark.usefixtures("_graphs")
def test_it_is_compiled_for_training_and_not_for_previews(run_options, monkeypatch):
    graphs, before, save = [], [], ValidationLogger.save
    monkeypatch.setattr(speed, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(ValidationLogger, "save", lambda *args: before.append(len(graphs)) or save(*args))
    train(TrainingConfig(**{**run_options, "compile": "network", "max_train_steps": 1}))
    assert before == [0, len(graphs)]
    assert len(graphs) > 0
    assert len(list(Path(run_options["output_dir"], "previews").iterdir())) == 2


@pytest.mark.full
def test_adam_in_8_bits(run_options, tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"use_8bit_adam": True}
    plain, small = tmp_path / "plain", tmp_path / "small"
    trained(TrainingConfig(**{**run_options, "output_dir": str(plain)}))
    trained(TrainingConfig(**{**run_options, **changes, "output_dir": str(small)}))
    # The first update is the sign of the gradient, in 8 bits too; later ones differ by a moment's rounding.
    assert losses(small) == pytest.approx(losses(plain), rel=0.02)
    kept = checkpoint(small, 4)
    moments = {name: value.dtype for name, value in kept.items() if name.endswith(("state1", "state2"))}
    assert set(moments.values()) == {torch.uint8, torch.float32}  # those of small tensors stay as they are
    assert same(resumed(small, tmp_path / "again", {**run_options, **changes}), kept)


def test_a_missing_library_is_named_before_anything_else(options, monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--use_8bit_adam needs bitsandbytes: python -m pip install bitsandbytes"):
        train(TrainingConfig(**{**options, "use_8bit_adam": True}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "blocks", "sharding": "optimizer"}, "--compile=blocks and --sharding=optimizer"),
        ({"ema_device": "cpu", "sharding": "parameters"}, "--ema_device=cpu and --sharding"),
    ],
)
def test_what_does_not_go_together(options, changes, message):
    with pytest.raises(ValueError, match=f"{message} are not compatible"):
        check_speed(TrainingConfig(**{**options, **changes}))


def test_a_network_without_repeated_blocks(small_run, image_folder):
    options = {**small_run, "train_data_dir": str(image_folder), "unet": "small-16", "compile": "blocks"}
    with pytest.raises(ValueError, match=r"--compile=blocks: (?s:.)*UNet2DModel.* Use network or none"):
        train(PixelTrainingConfig(**options))


@pytest.mark.full
@pytest.mark.parametrize(("allow_tf32", "precision"), [(False, "highest"), (True, "high")])
def test_float32_products_are_rounded_only_if_asked_and_as_long_as_the_run_lasts(
    options, monkeypatch, allow_tf32, precision
):
    seen, v_loss = [], trainer.v_loss
    monkeypatch.setattr(trainer, "v_loss", lambda *a: seen.append(torch.get_float32_matmul_precision()) or v_loss(*a))
    train(TrainingConfig(**{**options, "max_train_steps": 1, "allow_tf32": allow_tf32}))
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == "highest"


def test_layout():
    weight = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).weight
    value = torch.randn(weight.shape)
    copy = copy_with_strides_of(value, weight)
    assert torch.equal(copy, value)
    assert copy.stride() == weight.stride() != value.stride()
    step = torch.tensor(3.0)
    assert torch.equal(copy_with_strides_of(step, weight), step)
    assert copy_with_strides_of(step, weight).data_ptr() != step.data_ptr()


@pytest.mark.parametrize("stored", ["none", "both"])
def test_text_is_handed_over_in_the_dtype_of_the_products_and_nothing_changes(options, monkeypatch, tmp_path, stored):
    """Each layer would round it so; rounded once, weights are the same bit for bit."""
    seen, predict = [], StableDiffusion.predict

    def watched(self, unet, x_t, timestep, text, batch):
        seen.append(text["text"].dtype)
        return predict(self, unet, x_t, timestep, {"text": text["text"].to(wanted)}, batch)

    monkeypatch.setattr(StableDiffusion, "predict", watched)
    results = []
    for wanted in (torch.bfloat16, torch.float32):
        folder = str(tmp_path / str(wanted))
        changes = {"mixed_precision": "bf16", "cache": stored, "output_dir": folder, "ema_decay": 0.0}
        results.append(trained(TrainingConfig(**{**options, **changes})))
        AcceleratorState._reset_state(True)
    assert set(seen) == {torch.bfloat16}
    assert same(*results)

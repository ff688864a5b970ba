"""Each optimizer beside its formula, weights in bfloat16, updates in the backward pass; all resume exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_runs import launched, same

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, TrainingError, train, trainer
from zsnr_diffusers.training.optimization import Optimization
from zsnr_diffusers.training.optimizers import checkpoint_bytes, round_stochastically_

BF16 = {"full_bf16": True, "mixed_precision": "bf16", "ema_decay": 0.0}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0.0}
WAYS = {
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": 0},
    "adamw, fused": FUSED,
    "adamw in bf16": BF16,
    "8 bits in bf16": {**BF16, "use_8bit_adam": True},
    "adafactor in bf16, fused": {**BF16, **FUSED, "optimizer": "adafactor"},
    "lion in bf16, fused": {**BF16, **FUSED, "optimizer": "lion"},
}
NEED = {"lion": "bitsandbytes", "8 bits": "bitsandbytes", "prodigy": "prodigyopt"}


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Images of 8 x 8; do not change them."""
    folder, draw = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(draw.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def pixels(small_run, squares):
    """A small run on pixels."""
    return {**small_run, "unet": "small-8", "train_data_dir": str(squares), "validation_images": 0}


def checkpoint(folder, step):
    files = Path(folder, f"checkpoint-{step:06d}").glob("*.safetensors")
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def optimize(config, gradients, weight, seed=0):
    """A weight after a step for each gradient."""
    accelerator, _ = launched(config)
    parameter = nn.Parameter(weight.clone())
    optimization = Optimization([{"params": [parameter]}], config, accelerator, seed)
    for step, gradient in enumerate(gradients):
        optimization.set_step(step)
        parameter.grad = gradient.to(parameter.dtype).clone()
        if optimization.skips_on_device:
            optimization.update_unless(torch.tensor(0.0))
        else:
            optimization.update(finite=True)
        assert parameter.grad is None
    return parameter.detach()


def drawn(count, *shape):
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


SETTINGS = {"lr_scheduler": "constant", "learning_rate": 0.01, "adam_weight_decay": 0.1, "adam_beta1": 0.8}


def test_adamw_has_its_settings(options):
    config = TrainingConfig(**{**options, **SETTINGS, "adam_beta2": 0.95, "adam_epsilon": 1e-3})
    gradients, weight = drawn(4, 5, 3), torch.ones(5, 3)
    expected, mean, square = weight.clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    for step, gradient in enumerate(gradients, start=1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        expected = expected * (1 - 0.01 * 0.1)
        expected = expected - 0.01 * mean / (1 - 0.8**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-3)
    torch.testing.assert_close(optimize(config, gradients, weight), expected)


def test_lion_is_its_formula(options):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    pytest.importorskip("bitsandbytes")
    config = TrainingConfig(**{**options, **SETTINGS, "optimizer": "lion"})
    gradients, weight = drawn(4, 5, 3), torch.ones(5, 3)
    expected, mean = weight.clone(), torch.zeros(5, 3)
    for gradient in gradients:
        expected = expected - 0.01 * ((0.8 * mean + 0.2 * gradient).sign() + 0.1 * expected)
        mean = 0.99 * mean + 0.01 * gradient
    torch.testing.assert_close(optimize(config, gradients, weight), expected)


def test_adafactor_is_its_formula(options):
    """Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4, with an absolute learning rate."""
    config = TrainingConfig(**{**options, **SETTINGS, "optimizer": "adafactor"})
    gradients, weight = drawn(4, 5, 3), torch.ones(5, 3)
    expected, rows, columns = weight.clone(), torch.zeros(5), torch.zeros(3)
    for step, gradient in enumerate(gradients, start=1):
        beta = 1 - step**-0.8
        square = gradient**2 + 1e-30
        rows = beta * rows + (1 - beta) * square.mean(dim=1)
        columns = beta * columns + (1 - beta) * square.mean(dim=0)
        update = gradient / (torch.outer(rows, columns) / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(optimize(config, gradients, weight), expected)


def test_prodigy_finds_a_step_size(options):
    """On |x - 3| from 0 it has to grow from 1e-6 to about the distance."""
    pytest.importorskip("prodigyopt")
    changes = {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant", "adam_weight_decay": 0.0}
    accelerator, _ = launched(config := TrainingConfig(**{**options, **changes}))
    x = nn.Parameter(torch.zeros(4))
    optimization = Optimization([{"params": [x]}], config, accelerator)
    for step in range(300):
        optimization.set_step(step)
        x.grad = (x.detach() - 3).sign()
        optimization.update(finite=True)
    assert optimization.inner.param_groups[0]["d"] > 1e-2
    assert (x - 3).abs().max() < 1


# -- weights in bfloat16


def test_rounding_at_random_is_to_a_neighbor_and_right_on_average():
    draw = torch.Generator().manual_seed(0)
    for value in (1.001, -1.001, 3e-5, -250.7, 0.0, 1.5):
        exact = torch.full((20_000,), value)
        found = torch.empty_like(exact, dtype=torch.bfloat16)
        round_stochastically_(found, exact, draw)
        assert len(found.unique()) == (1 if value in (0.0, 1.5) else 2)  # those are bfloat16 already
        gap = found.float().max() - found.float().min()
        assert ((found.float() - exact).abs() <= gap).all()
        # A share p of 20,000 is up: its mean is within 4 standard deviations, at most gap / (2 sqrt(n)) each.
        assert (found.double().mean() - exact.double().mean()).abs() <= 4 * gap / 2 / 20_000**0.5


def test_small_updates_add_up_in_bfloat16(options):
    """Of 1e-4, where the next number below 1 is 4e-3 away: to the nearest, nothing would ever change."""
    changes = {**BF16, "learning_rate": 1e-4, "lr_scheduler": "constant", "adam_weight_decay": 0.0}
    config, gradients = TrainingConfig(**{**options, **changes}), [torch.ones(4096)] * 50
    found = optimize(config, gradients, torch.ones(4096, dtype=torch.bfloat16))
    expected = optimize(TrainingConfig(**{**options, **changes, "full_bf16": False}), gradients, torch.ones(4096))
    assert found.dtype == torch.bfloat16
    assert expected.mean().item() == pytest.approx(1 - 50e-4, abs=1e-5)
    assert found.double().mean().item() == pytest.approx(expected.mean().item(), abs=4 * 0.004 / 4096**0.5)
    again = optimize(config, gradients, torch.ones(4096, dtype=torch.bfloat16))
    other = optimize(config, gradients, torch.ones(4096, dtype=torch.bfloat16), seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


# -- runs


@pytest.mark.parametrize("way", WAYS)
def test_it_resumes_bit_for_bit(pixels, tmp_path, way):
    for word, library in NEED.items():
        if word in way:
            pytest.importorskip(library)
    options = {**pixels, **WAYS[way]}
    train(PixelTrainingConfig(**options))
    whole = checkpoint(options["output_dir"], 4)
    options["output_dir"] = str(tmp_path / "cut")
    train(PixelTrainingConfig(**{**options, "max_train_steps": 2}))
    train(PixelTrainingConfig(**{**options, "resume": True}))
    assert same(checkpoint(options["output_dir"], 4), whole)
    kinds = {value.dtype for name, value in whole.items() if name.startswith("unet")}
    assert kinds == {torch.bfloat16 if "bf16" in way else torch.float32}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_in_the_backward_pass_weights_become_what_they_are_after_it(pixels, tmp_path, monkeypatch, changes):
    plain = {**pixels, "max_grad_norm": 0.0, **changes}
    train(PixelTrainingConfig(**plain))
    most, update = [], Optimization._update_in_backward

    def watched(self, parameter):
        most.append(sum(one.grad is not None for one in self._group_of))
        update(self, parameter)

    monkeypatch.setattr(Optimization, "_update_in_backward", watched)
    train(PixelTrainingConfig(**{**plain, **FUSED, "output_dir": str(tmp_path / "fused")}))
    assert same(checkpoint(plain["output_dir"], 4), checkpoint(tmp_path / "fused", 4))
    assert set(most) == {1}  # never more than one gradient


def test_another_optimizer_is_another_run(pixels):
    train(PixelTrainingConfig(**{**pixels, "max_train_steps": 2}))
    with pytest.raises(ValueError, match="--optimizer was 'adamw' and is now 'adafactor'"):
        train(PixelTrainingConfig(**{**pixels, "optimizer": "adafactor", "resume": True}))


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_loss_that_is_not_finite_spoils_no_weight(pixels, monkeypatch, skipped):
    v_loss, calls = trainer.v_loss, iter((1.0, float("nan"), 1.0, 1.0))
    monkeypatch.setattr(trainer, "v_loss", lambda *args: v_loss(*args) * next(calls))
    config = PixelTrainingConfig(**{**pixels, **FUSED, "nan_skip": skipped})
    if not skipped:
        with pytest.raises(TrainingError, match="At step 2 the loss was nan"):
            train(config)
        return
    train(config)
    assert all(value.isfinite().all() for value in checkpoint(pixels["output_dir"], 4).values())


def test_gradients_that_are_not_finite_end_a_run_whose_weights_they_have_changed(pixels, monkeypatch):
    monkeypatch.setattr(Optimization, "take_norm", lambda self: torch.tensor(float("inf")))
    message = r"At step 1 the gradient norm was inf, and --fused_backward_pass had updated the weights by then; "
    with pytest.raises(TrainingError, match=message):
        train(PixelTrainingConfig(**{**pixels, **FUSED, "nan_skip": 5}))


@pytest.mark.parametrize("way", ["adamw", *WAYS])
def test_a_checkpoint_is_as_large_as_was_said(pixels, way):
    """But for headers, moments of weights that are all zero at first, and what bitsandbytes keeps of its own."""
    options = {**pixels, **WAYS.get(way, {}), "max_train_steps": 1}
    for word, library in NEED.items():
        if word in way:
            pytest.importorskip(library)
    train(config := PixelTrainingConfig(**options))
    found = checkpoint(options["output_dir"], 1)
    shapes = [value.shape for name, value in found.items() if name.startswith("unet ")]
    size = sum(value.numel() * value.element_size() for value in found.values())
    assert checkpoint_bytes(config, shapes) == pytest.approx(size, rel=0.05)

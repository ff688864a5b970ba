"""Settings that an optimizer does not have, or that precision, processes or libraries do not allow."""

import pytest

from zsnr_diffusers.training import TrainingConfig, optimizers
from zsnr_diffusers.training.optimizers import check_optimizer, check_updates

BF16 = {"full_bf16": True, "mixed_precision": "bf16", "ema_decay": 0.0}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "--optimizer='sgd' is unknown; choose one of adamw, adafactor, lion, prodigy"),
        ({"optimizer": "lion", "use_8bit_adam": True}, "--use_8bit_adam is of adamw, and --optimizer=lion"),
        ({"optimizer": "prodigy"}, r"multiplies it by --learning_rate, which is 0.001: pass --learning_rate 1"),
        ({"full_bf16": True}, "--full_bf16 and --ema_decay=0.9999: (.*) pass --ema_decay 0"),
        ({"fused_backward_pass": True}, "--max_grad_norm=1: pass --max_grad_norm 0"),
        ({**FUSED, "gradient_accumulation_steps": 2}, "--gradient_accumulation_steps=2: pass 1 with a larger"),
        ({**FUSED, "optimizer": "prodigy", "learning_rate": 1.0}, "--fused_backward_pass updates weights one by one"),
        ({"optimizer": "lion", "loss_weighting": "learned_uncertainty"}, "learned_uncertainty has a learning rate"),
        (
            {"distill_steps": 4, "lora_rank": 4, "validation_rows": 3},
            "--validation_rows=3 measures the loss on images, and --distill_steps=4 trains on none",
        ),
        ({"adam_beta1": 1.5}, r"--adam_beta1=1.5 must lie in \[0, 1\]"),
    ],
)
def test_settings_that_an_optimizer_does_not_have(options, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_8bit_adam": True, "channels_last": True}, "--use_8bit_adam and --channels_last"),
        ({"optimizer": "lion", "channels_last": True}, "--optimizer=lion and --channels_last"),
        ({"use_8bit_adam": True, "sharding": "optimizer"}, "--use_8bit_adam and --sharding=optimizer"),
        ({"optimizer": "adafactor", "sharding": "parameters"}, "--optimizer=adafactor and --sharding=parameters"),
        ({**FUSED, "sharding": "parameters"}, "--fused_backward_pass and --sharding=parameters"),
    ],
)
def test_what_does_not_go_together(options, monkeypatch, changes, message):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=f"{message} are not compatible"):
        check_optimizer(TrainingConfig(**{**options, **changes}))


@pytest.mark.parametrize("optimizer", ["lion", "prodigy"])
def test_a_missing_library_is_named(options, monkeypatch, optimizer):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    library = optimizers.OPTIMIZERS[optimizer].library
    with pytest.raises(ValueError, match=f"--optimizer={optimizer} needs {library}: python -m pip install {library}"):
        check_optimizer(TrainingConfig(**{**options, "optimizer": optimizer, "learning_rate": 1.0}))


class _Accelerator:
    """What `check_updates` asks."""

    def __init__(self, precision="no", processes=1):
        self.mixed_precision, self.num_processes = precision, processes


@pytest.mark.parametrize(
    ("changes", "accelerator", "message"),
    [
        (BF16, _Accelerator("no"), "--full_bf16 and --mixed_precision=no are not compatible: pass bf16"),
        (FUSED, _Accelerator("fp16"), "--fused_backward_pass and --mixed_precision=fp16"),
        (FUSED, _Accelerator("bf16", 2), "--fused_backward_pass updates weights before 2 processes have shared"),
    ],
)
def test_updates_that_precision_or_processes_do_not_allow(options, changes, accelerator, message):
    with pytest.raises(ValueError, match=message):
        check_updates(TrainingConfig(**{**options, **changes}), accelerator)

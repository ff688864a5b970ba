"""Recipes for training a pixel-space network from scratch, by name.

Ho et al. 2020 (DDPM, arXiv:2006.11239), appendix B and the released code: Adam, a warmup of 5000 steps and a constant
learning rate, a constant EMA decay, gradients clipped to norm 1, linear betas, the mean squared error of epsilon. Each
has a variant, `-zsnr`, with the fixes of Lin et al. 2023 (arXiv:2305.08891): zero terminal SNR and v-prediction.
"""

from collections.abc import Mapping
from typing import Any

_DDPM = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "random_flip": True,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5000,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "checkpointing_steps": 5000,
    "validation_steps": 5000,
}

_CIFAR10 = _DDPM | {
    "unet": "ddpm-cifar10",
    "resolution": 32,
    "dropout": 0.1,
    "variance_type": "fixed_large",
    "train_batch_size": 128,
    "learning_rate": 2e-4,
    "max_train_steps": 800_000,
}

_LSUN = _DDPM | {
    "unet": "ddpm-lsun",
    "resolution": 256,
    "dropout": 0.0,
    "variance_type": "fixed_small",
    "train_batch_size": 64,
    "learning_rate": 2e-5,
    "max_train_steps": 1_200_000,
}

_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "cifar10-ddpm": _CIFAR10,
    "cifar10-ddpm-zsnr": _CIFAR10 | _ZERO_SNR,
    "lsun-ddpm": _LSUN,
    "lsun-ddpm-zsnr": _LSUN | _ZERO_SNR,
}
"""Options of `PixelTrainingConfig`. The batch size is the global one: divide it over processes. The paper trained on
LSUN Church for 1.2 million steps, Cat 1.8, CelebA-HQ 0.5, and Bedroom 2.4 without flips."""

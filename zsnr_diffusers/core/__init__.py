"""The numbers: pure functions over float64 tables, one module per step of Lin et al. 2023 (arXiv:2305.08891).

Imports torch and the standard library only. `NoiseLevel` is the currency: whatever acts on a sample takes a noise
level, never a timestep or a table.
"""

from .guidance import classifier_free_guidance, rescale_guidance
from .losses import v_loss
from .noise import NoiseLevel, add_noise, alpha_bar_table, enforce_zero_terminal_snr, noise_level, snr
from .predictions import PREDICTION_TYPES, split_prediction, training_target
from .solvers import CLEAN, Update, ddim_update
from .spacing import TIMESTEP_SPACINGS, check_timesteps, spaced_timesteps

__all__ = [
    "CLEAN",
    "PREDICTION_TYPES",
    "TIMESTEP_SPACINGS",
    "NoiseLevel",
    "Update",
    "add_noise",
    "alpha_bar_table",
    "check_timesteps",
    "classifier_free_guidance",
    "ddim_update",
    "enforce_zero_terminal_snr",
    "noise_level",
    "rescale_guidance",
    "snr",
    "spaced_timesteps",
    "split_prediction",
    "training_target",
    "v_loss",
]

"""The mathematics as pure functions over float64 tables, one module per step of Lin et al. 2023 (arXiv:2305.08891).

Modules import only torch and the standard library, and `choices` not even torch; names are imported on first use.
Every function that acts on a sample takes a `NoiseLevel`, never a timestep or a table.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .choices import FLOW_TIME_SAMPLINGS, LOSS_WEIGHTINGS, PREDICTION_TYPES, check_loss_weighting
    from .distillation import SegmentedSampler, student_sampler, teacher_sampler
    from .flow import (
        flow_level,
        flow_time,
        kappa_times,
        sample_scale,
        shifted_time,
        trailing_times,
        variance_preserving,
    )
    from .flow_densities import flow_times
    from .guidance import classifier_free_guidance, rescale_guidance
    from .likelihood import (
        StepKL,
        bound_strata,
        decoder_std,
        discretized_log_likelihood,
        prior_kl,
        step_kl,
        step_kl_factors,
    )
    from .losses import v_loss
    from .low_frequencies import guided_prediction, keep_low_frequencies, low_pass
    from .multistep import multistep_updates
    from .noise import (
        SCHEDULE_NAMES,
        NoiseLevel,
        add_noise,
        alpha_bar_table,
        betas_of_table,
        enforce_zero_terminal_snr,
        kappa,
        noise_level,
        schedule_table,
        shift_snr,
        snr,
        transition,
    )
    from .predictions import (
        converted_prediction,
        dynamic_threshold,
        ideal_output,
        training_target,
        x_0_factors,
    )
    from .solvers import (
        CLEAN,
        Update,
        consistency_updates,
        ddim_update,
        ddim_updates,
        ddpm_updates,
        inversion_updates,
        pndm_updates,
    )
    from .spacing import (
        TIMESTEP_SPACINGS,
        check_timesteps,
        spaced_timesteps,
        subdivided_timesteps,
        timesteps_of_sigmas,
    )
    from .weightings import level_features, loss_weights, uncertainty_loss

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "choices": "FLOW_TIME_SAMPLINGS LOSS_WEIGHTINGS PREDICTION_TYPES check_loss_weighting",
        "distillation": "SegmentedSampler student_sampler teacher_sampler",
        "flow": "flow_level flow_time kappa_times sample_scale shifted_time trailing_times variance_preserving",
        "flow_densities": "flow_times",
        "guidance": "classifier_free_guidance rescale_guidance",
        "likelihood": "StepKL bound_strata decoder_std discretized_log_likelihood prior_kl step_kl step_kl_factors",
        "losses": "v_loss",
        "low_frequencies": "guided_prediction keep_low_frequencies low_pass",
        "multistep": "multistep_updates",
        "noise": (
            "SCHEDULE_NAMES NoiseLevel add_noise alpha_bar_table betas_of_table enforce_zero_terminal_snr kappa "
            "noise_level schedule_table shift_snr snr transition"
        ),
        "predictions": "converted_prediction dynamic_threshold ideal_output training_target x_0_factors",
        "solvers": (
            "CLEAN Update consistency_updates ddim_update ddim_updates ddpm_updates inversion_updates pndm_updates"
        ),
        "spacing": "TIMESTEP_SPACINGS check_timesteps spaced_timesteps subdivided_timesteps timesteps_of_sigmas",
        "weightings": "level_features loss_weights uncertainty_loss",
    },
)

__all__ = [
    "CLEAN",
    "FLOW_TIME_SAMPLINGS",
    "LOSS_WEIGHTINGS",
    "PREDICTION_TYPES",
    "SCHEDULE_NAMES",
    "TIMESTEP_SPACINGS",
    "NoiseLevel",
    "SegmentedSampler",
    "StepKL",
    "Update",
    "add_noise",
    "alpha_bar_table",
    "betas_of_table",
    "bound_strata",
    "check_loss_weighting",
    "check_timesteps",
    "classifier_free_guidance",
    "consistency_updates",
    "converted_prediction",
    "ddim_update",
    "ddim_updates",
    "ddpm_updates",
    "decoder_std",
    "discretized_log_likelihood",
    "dynamic_threshold",
    "enforce_zero_terminal_snr",
    "flow_level",
    "flow_time",
    "flow_times",
    "guided_prediction",
    "ideal_output",
    "inversion_updates",
    "kappa",
    "kappa_times",
    "keep_low_frequencies",
    "level_features",
    "loss_weights",
    "low_pass",
    "multistep_updates",
    "noise_level",
    "pndm_updates",
    "prior_kl",
    "rescale_guidance",
    "sample_scale",
    "schedule_table",
    "shift_snr",
    "shifted_time",
    "snr",
    "spaced_timesteps",
    "step_kl",
    "step_kl_factors",
    "student_sampler",
    "subdivided_timesteps",
    "teacher_sampler",
    "timesteps_of_sigmas",
    "trailing_times",
    "training_target",
    "transition",
    "uncertainty_loss",
    "v_loss",
    "variance_preserving",
    "x_0_factors",
]

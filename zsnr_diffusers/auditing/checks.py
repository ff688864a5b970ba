"""All known faults, each looked for by a function of its own that returns a `Finding` or None."""

from collections.abc import Callable

from . import model_checks as model
from . import sampler_checks as sampler
from .finding import Finding, Severity
from .subject import Setup

CHECKS: tuple[Callable[[Setup], Finding | None], ...] = (
    model.schedule_left_behind,
    model.prediction_type,
    model.epsilon_at_zero_snr,
    model.terminal_snr,
    model.flag_without_training,
    sampler.flag_ignored,
    sampler.last_timestep_missed,
    model.rescaled_betas,
    model.clip_in_latents,
    model.assigned,
    model.patched_schedule,
    model.class_mismatch,
    sampler.final_alpha,
    sampler.final_sigma,
    sampler.log_sigma_spacing,
    sampler.step_size,
    sampler.large_variance,
    sampler.leaves_noise,
    sampler.crashes,
    sampler.extra_timestep,
    sampler.eta_one,
    sampler.half_precision_noise,
    model.no_guidance_rescale,
    sampler.not_run,
)

ORDER: tuple[Severity, ...] = ("error", "not zero-SNR", "note")


def faults(setup: Setup) -> tuple[Finding, ...]:
    """Everything that is found, errors first."""
    found = [finding for check in CHECKS if (finding := check(setup)) is not None]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.severity)))

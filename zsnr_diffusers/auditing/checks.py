"""All known issues, each with a check function that returns a `Finding` or None."""

from collections.abc import Callable, Iterator

from . import flow_checks as flow
from . import model_checks as model
from . import sampler_checks as sampler
from .finding import Finding, Severity
from .flow_subject import FlowSchedulerUnderTest
from .subject import SchedulerUnderTest

CHECKS: tuple[Callable[[SchedulerUnderTest], Finding | None], ...] = (
    model.check_schedule_left_behind,
    model.check_prediction_type_mismatch,
    model.check_epsilon_at_zero_snr,
    model.check_terminal_snr,
    model.check_flag_without_training,
    sampler.check_flag_ignored,
    sampler.check_last_timestep_missed,
    model.check_rescaled_betas,
    model.check_clip_in_latents,
    model.check_assigned_config,
    model.check_patched_schedule,
    model.check_class_mismatch,
    sampler.check_final_alpha,
    sampler.check_final_sigma,
    sampler.check_log_sigma_spacing,
    sampler.check_step_size,
    sampler.check_large_variance,
    sampler.check_leaves_noise,
    sampler.check_crashes,
    sampler.check_extra_timestep,
    sampler.check_eta_one,
    sampler.check_half_precision_noise,
    model.check_guidance_rescale_missing,
    sampler.check_not_run,
)

SHARED_CHECKS: tuple[Callable[[SchedulerUnderTest], Finding | None], ...] = (
    model.check_schedule_left_behind,
    model.check_assigned_config,
    model.check_class_mismatch,
)
"""Checks that also apply to flow-matching models."""

FLOW_CHECKS: tuple[Callable[[FlowSchedulerUnderTest], Finding | None], ...] = (
    flow.check_betas_for_flow,
    flow.check_prediction_type_mismatch,
    flow.check_epsilon_in_flow_time,
    flow.check_missing_scheduler_attributes,
    flow.check_double_shift,
    flow.check_first_step,
    flow.check_wasted_last_step,
    flow.check_broken_sigmas,
    flow.check_leaves_noise,
    flow.check_crashes,
    flow.check_cut_timesteps,
    flow.check_not_run,
)
"""Checks that apply to flow-matching models only."""

ORDER: tuple[Severity, ...] = ("error", "not zero-SNR", "wasteful", "note")


def run_checks(setup: SchedulerUnderTest) -> tuple[Finding, ...]:
    """Run every audit check on a scheduler and return what they find, errors first."""
    return tuple(sorted(_iter_findings(setup), key=lambda finding: ORDER.index(finding.severity)))


def _iter_findings(setup: SchedulerUnderTest) -> Iterator[Finding]:
    """Findings of the checks for models with betas, or of those for flow-matching models."""
    yield from (
        finding for check in (SHARED_CHECKS if setup.flow else CHECKS) if (finding := check(setup)) is not None
    )
    if isinstance(setup, FlowSchedulerUnderTest):
        yield from (finding for check in FLOW_CHECKS if (finding := check(setup)) is not None)

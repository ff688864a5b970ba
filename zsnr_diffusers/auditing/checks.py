"""All known faults, each looked for by a function of its own that returns a `Finding` or None."""

from collections.abc import Callable, Iterator

from . import flow_checks as flow
from . import model_checks as model
from . import sampler_checks as sampler
from .finding import Finding, Severity
from .flow_subject import FlowSchedulerUnderTest
from .subject import SchedulerUnderTest

CHECKS: tuple[Callable[[SchedulerUnderTest], Finding | None], ...] = (
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

OF_BOTH: tuple[Callable[[SchedulerUnderTest], Finding | None], ...] = (
    model.schedule_left_behind,
    model.assigned,
    model.class_mismatch,
)
"""Those that have to do with a model of flow matching, too."""

OF_FLOW: tuple[Callable[[FlowSchedulerUnderTest], Finding | None], ...] = (
    flow.betas_for_flow,
    flow.of_another_kind,
    flow.epsilon_in_flow_time,
    flow.lacks_what_is_asked,
    flow.double_shift,
    flow.first_step,
    flow.wasted_last_step,
    flow.broken_sigmas,
    flow.leaves_noise,
    flow.crashes,
    flow.cut_timesteps,
    flow.not_run,
)
"""Those of a model of flow matching alone."""

ORDER: tuple[Severity, ...] = ("error", "not zero-SNR", "wasteful", "note")


def faults(setup: SchedulerUnderTest) -> tuple[Finding, ...]:
    """Everything that is found, errors first."""
    return tuple(sorted(_found(setup), key=lambda finding: ORDER.index(finding.severity)))


def _found(setup: SchedulerUnderTest) -> Iterator[Finding]:
    yield from (finding for check in (OF_BOTH if setup.flow else CHECKS) if (finding := check(setup)) is not None)
    if isinstance(setup, FlowSchedulerUnderTest):
        yield from (finding for check in OF_FLOW if (finding := check(setup)) is not None)

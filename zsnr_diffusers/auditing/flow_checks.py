"""Checks for the schedulers of flow-matching models, based on the flow times they visit and on running them."""

import math
from itertools import pairwise
from typing import Any

from ..core.flow import shifted_time, unshifted_time
from ..hub.flow_models import missing_scheduler_attributes, required_scheduler_attributes
from ..schedulers.stock import unipc_flow_config
from .finding import Finding, Severity, format_step_numbers, from_config_line, replacement_line, severity_at_steps
from .flow_subject import FlowSchedulerUnderTest, share_of_last_step
from .simulate import TOLERANCE
from .subject import REPORTED_STEPS

WASTED = 0.1
"""Fraction of an even step below which the last step is wasted: diffusers' own last sigma gives 0.00 to 0.06 at 5
steps, and evenly spaced steps, before or after a shift, give at least 0.8.
"""

LEAK = 0.01
"""Signal in the first sample from which the network can infer brightness; less than this is a note."""

CUT = 0.01
"""Tolerance of a timestep; rounding in float32 is below 1e-4."""


def unipc_config_changes(setup: FlowSchedulerUnderTest) -> dict[str, Any]:
    """Config changes that make it diffusers' `UniPCMultistepScheduler` with flow times, which uses all its steps."""
    return {"_class_name": "UniPCMultistepScheduler", **unipc_flow_config(setup.shift, len(setup.trained))}


def _unipc_fix(setup: FlowSchedulerUnderTest) -> dict[str, Any] | None:
    """The same as a fix if the config has `flow_shift`, so that its pipeline supports UniPC; None for distilled
    models.
    """
    return unipc_config_changes(setup) if "flow_shift" in setup.config and not setup.is_distilled else None


def check_betas_for_flow(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a flow-matching model that is sampled with a scheduler for betas."""
    if setup.has_flow_config:
        return None
    what = (
        f"the network predicts flow_prediction, noise - x_0 in flow time, but is sampled by "
        f"{setup.scheduler_class.__name__}, which has betas"
    )
    line = (
        "pipe.scheduler = zsnr_diffusers.FlowMatchMultistepScheduler.from_config(pipe.scheduler.config, "
        "prediction_type='flow_prediction')"
    )
    return Finding("betas-for-flow", "error", what, line, unipc_config_changes(setup))


def check_prediction_type_mismatch(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a flow scheduler whose `prediction_type` is not the one that the network was trained for."""
    known, said = setup.source.prediction_type, setup.config["prediction_type"]
    if known in (None, said) or not setup.has_flow_config:
        return None
    if known == "flow_prediction":
        fix = {"prediction_type": known}
        what = f"the network predicts {known}, but is sampled as prediction_type={said!r}"
        return Finding("prediction-type", "error", what, from_config_line(setup, fix), fix)
    what = f"the network predicts {known}, but is sampled in flow time by {setup.scheduler_class.__name__}"
    remedy = "use the betas that it was trained with:\n" + (
        f"pipe.scheduler = zsnr_diffusers.ZeroSNRMultistepScheduler(prediction_type={known!r}, beta_start=..., "
        "beta_end=..., beta_schedule=...)"
    )
    return Finding("prediction-type", "error", what, remedy)


def check_epsilon_in_flow_time(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report `prediction_type="epsilon"` in flow time, usually the default of a config without one."""
    if not setup.has_flow_config or setup.config["prediction_type"] != "epsilon" or setup.source.prediction_type:
        return None
    what = (
        "prediction_type='epsilon' in flow time: at the first step the sample is the noise, so predicting the noise "
        "gives no information about the image"
    )
    remedy = f"a flow-matching model:\n{from_config_line(setup, {'prediction_type': 'flow_prediction'})}"
    return Finding("epsilon-in-flow-time", "error", what, remedy)


def check_missing_scheduler_attributes(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report attributes that the pipeline uses and this scheduler class lacks; the first call raises."""
    if setup.scheduler is None:
        return None
    lacking = missing_scheduler_attributes(setup.pipeline_source_code, setup.scheduler)
    if not lacking:
        return None
    what = (
        f"{setup.source.index['_class_name']} uses {' and '.join(lacking)}, which {setup.scheduler_class.__name__} "
        "does not have: it raises AttributeError"
    )
    fix = (
        unipc_config_changes(setup)
        if "scale_noise" not in required_scheduler_attributes(setup.pipeline_source_code) and not setup.is_distilled
        else None
    )
    return Finding("not-offered", "error", what, replacement_line(setup), fix)


def check_double_shift(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a `shift` that is applied twice at the end of the flow-time range, which makes steps uneven."""
    steps, path = max(setup.valid_flow_times.items(), default=(0, ()))
    if setup.is_distilled or setup.shift == 1 or not path:
        return None
    once = float(shifted_time(1 / len(setup.trained), setup.shift))
    twice = float(shifted_time(once, setup.shift))
    if not math.isclose(path[-2], twice, rel_tol=1e-3):
        return None
    before, T = float(unshifted_time(path[-2], setup.shift)), len(setup.trained)
    what = (
        f"shift={setup.shift:g} is applied twice at the end of the range: {steps} steps end at {path[-2]:.4g}, which "
        f"is {before:.4g} before one shift, instead of {1 / T:g}; steps are uneven at every n"
    )
    return Finding(
        "double-shift", "wasteful", what, replacement_line(setup), _unipc_fix(setup), tuple(setup.valid_flow_times)
    )


def check_first_step(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a first sigma below 1, which makes the network treat pure noise as a sample with some signal."""
    leaks = {n: 1 - path[0] for n, path in setup.flow_times_by_steps.items() if 1 - path[0] > TOLERANCE / 10}
    if not leaks:
        return None
    worst = max(leaks.values())
    what = (
        f"the first sigma is {1 - worst:.6g} and not 1 at {format_step_numbers(leaks)}: the network treats pure noise "
        "as a sample with some signal"
    )
    severity: Severity = "error" if any(leaks.get(n, 0) > LEAK for n in REPORTED_STEPS) else "note"
    return Finding("first-step-below-noise", severity, what, replacement_line(setup), _unipc_fix(setup), tuple(leaks))


def check_wasted_last_step(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a last step that covers almost none of the path from noise to data."""
    if setup.is_distilled or setup.is_from_this_package:
        return None
    shares = {n: share_of_last_step(path) for n, path in setup.valid_flow_times.items() if n > 1}
    wasted = {n: share for n, share in shares.items() if share < WASTED}
    if not wasted:
        return None
    n = next((n for n in REPORTED_STEPS if n in wasted), next(iter(wasted)))
    what = (
        f"the last of {n} steps starts at sigma {setup.valid_flow_times[n][-2]:.4g} and does {wasted[n]:.2g} of an "
        f"even step, so it is wasted: {format_step_numbers(wasted)}"
    )
    if setup.may_be_distilled:
        remedy = (
            f"if the model was not distilled:\n{replacement_line(setup)}\n"
            f"if it was:\n{replacement_line(setup, trailing=True)}"
        )
        return Finding("wasted-last-step", "note", what, remedy, steps=tuple(wasted))
    severity: Severity = "wasteful" if set(wasted) & set(REPORTED_STEPS) else "note"
    return Finding("wasted-last-step", severity, what, replacement_line(setup), _unipc_fix(setup), tuple(wasted))


def check_broken_sigmas(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report sigmas that repeat, increase, are NaN, or do not match the requested step count."""
    broken = {n: path for n, path in setup.flow_times_by_steps.items() if n not in setup.valid_flow_times}
    # A last step that ends where it starts is reported by the sample it leaves.
    broken = {n: path for n, path in broken.items() if not _has_empty_last_step(path, n)}
    if not broken:
        return None
    kinds = {
        "is NaN": [n for n, path in broken.items() if any(math.isnan(s) for s in path)],
        "are more or fewer than requested": [n for n, path in broken.items() if len(path) != n + 1],
    }
    told = [n for numbers in kinds.values() for n in numbers]
    kinds["repeat or increase"] = [n for n in broken if n not in told]
    what = "; ".join(f"sigmas: {kind} at {format_step_numbers(numbers)}" for kind, numbers in kinds.items() if numbers)
    return Finding(
        "broken-sigmas", severity_at_steps(broken), what, replacement_line(setup), _unipc_fix(setup), tuple(broken)
    )


def _has_empty_last_step(path: tuple[float, ...], n: int) -> bool:
    """Whether flow times are valid except for the last step, which ends where it starts."""
    steps = path[:-1]
    return len(path) == n + 1 and path[-1] == path[-2] and all(a > b for a, b in pairwise(steps))


def check_leaves_noise(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report a flow sampler that misses single-point data although its network is exact."""
    missing = {n: missed for n, missed in setup.point_errors.items() if n not in steps_with_broken_sigmas(setup)}
    if not missing:
        return None
    name = setup.scheduler_class.__name__
    if infinite := [n for n, missed in missing.items() if missed == math.inf]:
        what = f"{name} returns NaN or infinity at {format_step_numbers(infinite)}"
        return Finding(
            "not-finite",
            severity_at_steps(infinite),
            what,
            replacement_line(setup),
            _unipc_fix(setup),
            tuple(infinite),
        )
    what = f"{name} misses single-point data by up to {max(missing.values()):.2g} at {format_step_numbers(missing)}"
    if setup.config.get("final_sigmas_type") == "sigma_min":
        fix: dict[str, Any] | None = {"final_sigmas_type": "zero"}
        what += ": final_sigmas_type='sigma_min' ends before the data"
        return Finding(
            "leaves-noise", severity_at_steps(missing), what, from_config_line(setup, fix or {}), fix, tuple(missing)
        )
    return Finding(
        "leaves-noise", severity_at_steps(missing), what, replacement_line(setup), _unipc_fix(setup), tuple(missing)
    )


def steps_with_broken_sigmas(setup: FlowSchedulerUnderTest) -> tuple[int, ...]:
    """Step counts that `check_broken_sigmas` reports, which other checks skip."""
    found = check_broken_sigmas(setup)
    return () if found is None else found.steps


def check_crashes(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Report exceptions of the simulated runs of a flow scheduler."""
    crashed = {run.num_inference_steps: run.error for run in setup.simulations if run.error is not None}
    if not crashed:
        return None
    what = (
        f"{setup.scheduler_class.__name__} crashes at {format_step_numbers(crashed)}: {next(iter(crashed.values()))}"
    )
    return Finding(
        "crashes", severity_at_steps(crashed), what, replacement_line(setup), _unipc_fix(setup), tuple(crashed)
    )


def check_cut_timesteps(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Note timesteps that are truncated to integers, so that the network is told less noise than the sample has."""
    if setup.config.get("invert_sigmas"):
        return None
    T, off = len(setup.trained), {}
    for n, timesteps in setup.visited_timesteps.items():
        path = setup.flow_times_by_steps[n]
        if setup.order == 1 and len(timesteps) == len(path) - 1:
            off[n] = max(abs(t - T * s) for t, s in zip(timesteps, path, strict=False))
    cut = {n: error for n, error in off.items() if error > CUT}
    if not cut:
        return None
    what = f"the network receives timesteps truncated to integers, by up to {max(cut.values()):.2g}"
    return Finding("cut-timesteps", "note", what, replacement_line(setup), steps=tuple(cut))


def check_not_run(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Note that the flow scheduler was not simulated, and why."""
    if setup.skip_reason is None or not setup.has_flow_config:  # a separate check reports this
        return None
    what = f"{setup.scheduler_class.__name__} was not run: {setup.skip_reason}; only its config was checked"
    return Finding("not-run", "note", what, replacement_line(setup))

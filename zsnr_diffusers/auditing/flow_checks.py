"""Faults of the schedulers of flow-matching models, told by what they visit and by running them."""

import math
from itertools import pairwise
from typing import Any

from ..core.flow import shifted_time, unshifted_time
from ..hub.flow_models import asked_of_scheduler, not_offered
from ..schedulers.stock import flow_settings
from .finding import Finding, Severity, code, listed_numbers, ours, severity_for
from .flow_subject import FlowSchedulerUnderTest, share_of_last_step
from .simulate import TOLERANCE
from .subject import REPORTED_STEPS

WASTED = 0.1
"""Shares of an even step below which the last one is wasted: stock's own last sigma gives 0.00 to 0.06 at 5 steps, and
steps that are spaced evenly, before or after a shift, at least 0.8."""

LEAK = 0.01
"""Signal in the first sample from which on its brightness is read off it; below, it is a note."""

CUT = 0.01
"""Of a timestep; a rounding in float32 is below 1e-4."""


def as_stock(setup: FlowSchedulerUnderTest) -> dict[str, Any]:
    """Changes that make it stock's `UniPCMultistepScheduler` over flow times, which does all its steps."""
    return {"_class_name": "UniPCMultistepScheduler", **flow_settings(setup.shift, len(setup.trained))}


def _to_stock(setup: FlowSchedulerUnderTest) -> dict[str, Any] | None:
    """The same where the scheduler is one that such a one stands in for, in a pipeline that can run it."""
    return as_stock(setup) if "flow_shift" in setup.config and not setup.distilled else None


def betas_for_flow(setup: FlowSchedulerUnderTest) -> Finding | None:
    """A scheduler with betas under a model of flow matching."""
    if setup.in_flow_time:
        return None
    what = (
        f"the network predicts flow_prediction, noise - x_0 in flow time, but is sampled by "
        f"{setup.scheduler_class.__name__}, which has betas"
    )
    line = (
        "pipe.scheduler = zsnr_diffusers.FlowMatchMultistepScheduler.from_config(pipe.scheduler.config, "
        "prediction_type='flow_prediction')"
    )
    return Finding("betas-for-flow", "error", what, line, as_stock(setup))


def of_another_kind(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Another prediction type than the network was trained for, where that is known from elsewhere."""
    known, said = setup.source.prediction_type, setup.config["prediction_type"]
    if known in (None, said) or not setup.in_flow_time:
        return None
    if known == "flow_prediction":
        fix = {"prediction_type": known}
        what = f"the network predicts {known}, but is sampled as prediction_type={said!r}"
        return Finding("prediction-type", "error", what, code(setup, fix), fix)
    what = f"the network predicts {known}, but is sampled in flow time by {setup.scheduler_class.__name__}"
    remedy = "give it the betas that it was trained on:\n" + (
        f"pipe.scheduler = zsnr_diffusers.ZeroSNRMultistepScheduler(prediction_type={known!r}, beta_start=..., "
        "beta_end=..., beta_schedule=...)"
    )
    return Finding("prediction-type", "error", what, remedy)


def epsilon_in_flow_time(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Noise predicted where the sample is the noise; most often what a config that says nothing is taken for."""
    if not setup.in_flow_time or setup.config["prediction_type"] != "epsilon" or setup.source.prediction_type:
        return None
    what = (
        "prediction_type='epsilon' in flow time: at its first step the sample is the noise, and predicting it says "
        "nothing of the image"
    )
    remedy = f"a model of flow matching:\n{code(setup, {'prediction_type': 'flow_prediction'})}"
    return Finding("epsilon-in-flow-time", "error", what, remedy)


def lacks_what_is_asked(setup: FlowSchedulerUnderTest) -> Finding | None:
    """What the pipeline asks of its scheduler, and this class does not have: it raises at the first call."""
    if setup.scheduler is None:
        return None
    lacking = not_offered(setup.asked_of, setup.scheduler)
    if not lacking:
        return None
    what = (
        f"{setup.source.index['_class_name']} asks its scheduler for {' and '.join(lacking)}, which "
        f"{setup.scheduler_class.__name__} does not have: it raises AttributeError"
    )
    fix = as_stock(setup) if "scale_noise" not in asked_of_scheduler(setup.asked_of) and not setup.distilled else None
    return Finding("not-offered", "error", what, ours(setup), fix)


def double_shift(setup: FlowSchedulerUnderTest) -> Finding | None:
    """The end of the range shifted when the scheduler is made, and again with all the rest."""
    steps, path = max(setup.sound.items(), default=(0, ()))
    if setup.distilled or setup.shift == 1 or not path:
        return None
    once = float(shifted_time(1 / len(setup.trained), setup.shift))
    twice = float(shifted_time(once, setup.shift))
    if not math.isclose(path[-2], twice, rel_tol=1e-3):
        return None
    before, T = float(unshifted_time(path[-2], setup.shift)), len(setup.trained)
    what = (
        f"shift={setup.shift:g} is applied twice to the end of the range: {steps} steps end at {path[-2]:.4g}, which "
        f"is {before:.4g} before one shift, in place of {1 / T:g}; steps are uneven at every n"
    )
    return Finding("double-shift", "wasteful", what, ours(setup), _to_stock(setup), tuple(setup.sound))


def first_step(setup: FlowSchedulerUnderTest) -> Finding | None:
    """A first step that takes the noise for a sample with some signal."""
    leaks = {n: 1 - path[0] for n, path in setup.paths.items() if 1 - path[0] > TOLERANCE / 10}
    if not leaks:
        return None
    worst = max(leaks.values())
    what = (
        f"the first sigma is {1 - worst:.6g} and not 1 at {listed_numbers(leaks)}: pure noise is taken for a sample "
        "with some of the image in it"
    )
    severity: Severity = "error" if any(leaks.get(n, 0) > LEAK for n in REPORTED_STEPS) else "note"
    return Finding("first-step-below-noise", severity, what, ours(setup), _to_stock(setup), tuple(leaks))


def wasted_last_step(setup: FlowSchedulerUnderTest) -> Finding | None:
    """A last step from where there is nothing left to do."""
    if setup.distilled or setup.ours:
        return None
    shares = {n: share_of_last_step(path) for n, path in setup.sound.items() if n > 1}
    wasted = {n: share for n, share in shares.items() if share < WASTED}
    if not wasted:
        return None
    n = next((n for n in REPORTED_STEPS if n in wasted), next(iter(wasted)))
    what = (
        f"the last of {n} steps starts at sigma {setup.sound[n][-2]:.4g} and does {wasted[n]:.2g} of an even share of "
        f"the way, so it is wasted: {listed_numbers(wasted)}"
    )
    if setup.may_be_distilled:
        remedy = f"if the model was not distilled:\n{ours(setup)}\nif it was:\n{ours(setup, trailing=True)}"
        return Finding("wasted-last-step", "note", what, remedy, steps=tuple(wasted))
    severity: Severity = "wasteful" if set(wasted) & set(REPORTED_STEPS) else "note"
    return Finding("wasted-last-step", severity, what, ours(setup), _to_stock(setup), tuple(wasted))


def broken_sigmas(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Flow times that repeat, go back, are too few or not a number."""
    broken = {n: path for n, path in setup.paths.items() if n not in setup.sound}
    # One that ends where its last step started is told by what it leaves.
    broken = {n: path for n, path in broken.items() if not _only_ends_early(path, n)}
    if not broken:
        return None
    kinds = {
        "is NaN": [n for n, path in broken.items() if any(math.isnan(s) for s in path)],
        "are more or fewer than asked for": [n for n, path in broken.items() if len(path) != n + 1],
    }
    told = [n for numbers in kinds.values() for n in numbers]
    kinds["repeat or go back"] = [n for n in broken if n not in told]
    what = "; ".join(f"sigmas: {kind} at {listed_numbers(numbers)}" for kind, numbers in kinds.items() if numbers)
    return Finding("broken-sigmas", severity_for(broken), what, ours(setup), _to_stock(setup), tuple(broken))


def _only_ends_early(path: tuple[float, ...], n: int) -> bool:
    steps = path[:-1]
    return len(path) == n + 1 and path[-1] == path[-2] and all(a > b for a, b in pairwise(steps))


def leaves_noise(setup: FlowSchedulerUnderTest) -> Finding | None:
    """A miss of data that is one point, by an exact network."""
    missing = {n: missed for n, missed in setup.missing.items() if n not in broken_numbers(setup)}
    if not missing:
        return None
    name = setup.scheduler_class.__name__
    if infinite := [n for n, missed in missing.items() if missed == math.inf]:
        what = f"{name} returns NaN or infinity at {listed_numbers(infinite)}"
        return Finding("not-finite", severity_for(infinite), what, ours(setup), _to_stock(setup), tuple(infinite))
    what = f"{name} misses data that is one point by up to {max(missing.values()):.2g} at {listed_numbers(missing)}"
    if setup.config.get("final_sigmas_type") == "sigma_min":
        fix: dict[str, Any] | None = {"final_sigmas_type": "zero"}
        what += ": final_sigmas_type='sigma_min' ends before the data"
        return Finding("leaves-noise", severity_for(missing), what, code(setup, fix or {}), fix, tuple(missing))
    return Finding("leaves-noise", severity_for(missing), what, ours(setup), _to_stock(setup), tuple(missing))


def broken_numbers(setup: FlowSchedulerUnderTest) -> tuple[int, ...]:
    """Numbers of steps whose flow times are a finding of their own."""
    found = broken_sigmas(setup)
    return () if found is None else found.steps


def crashes(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Any exception."""
    crashed = {run.num_inference_steps: run.error for run in setup.runs if run.error is not None}
    if not crashed:
        return None
    what = f"{setup.scheduler_class.__name__} crashes at {listed_numbers(crashed)}: {next(iter(crashed.values()))}"
    return Finding("crashes", severity_for(crashed), what, ours(setup), _to_stock(setup), tuple(crashed))


def cut_timesteps(setup: FlowSchedulerUnderTest) -> Finding | None:
    """Timesteps that are whole numbers where flow times are not: the network is asked at less noise than there is."""
    if setup.config.get("invert_sigmas"):
        return None
    T, off = len(setup.trained), {}
    for n, timesteps in setup.visited.items():
        path = setup.paths[n]
        if setup.order == 1 and len(timesteps) == len(path) - 1:
            off[n] = max(abs(t - T * s) for t, s in zip(timesteps, path, strict=False))
    cut = {n: error for n, error in off.items() if error > CUT}
    if not cut:
        return None
    what = f"timesteps are cut to whole numbers, by up to {max(cut.values()):.2g}, and the network gets these"
    return Finding("cut-timesteps", "note", what, ours(setup), steps=tuple(cut))


def not_run(setup: FlowSchedulerUnderTest) -> Finding | None:
    """A scheduler that cannot be run here."""
    if setup.not_run is None or not setup.in_flow_time:  # which is a finding of its own
        return None
    what = f"{setup.scheduler_class.__name__} was not run: {setup.not_run}; its config alone was looked at"
    return Finding("not-run", "note", what, ours(setup))

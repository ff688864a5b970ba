"""Faults of samplers, told by running them."""

import math

import torch

from .finding import LOG_SIGMA, Finding, Severity, code, listed_numbers, ours, severity_for, takes, to_euler
from .model_checks import rescaled_betas
from .simulate import TOLERANCE, diverges_at_eta_one, wrong_noise
from .subject import SchedulerUnderTest

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
WRONG_STEP = 0.01
"""Relative error of the spread of brightness that is a wrong step and no rounding."""


def as_published(setup: SchedulerUnderTest) -> Severity:
    """How bad it is where Stable Diffusion's own configs have it: at zero SNR an error, for others how they work."""
    return "error" if setup.zero_snr else "not zero-SNR"


def flag_ignored(setup: SchedulerUnderTest) -> Finding | None:
    """A class that keeps the flag in its config and has the schedule without it."""
    if setup.honours_flag:
        return None
    name = setup.scheduler_class.__name__
    what = f"{name} ignores rescale_betas_zero_snr: it samples at sqrt(alpha_bar_T) = {setup.terminal_alpha:.4g}"
    return Finding("flag-ignored", "error", what, *to_euler(setup))


def last_timestep_missed(setup: SchedulerUnderTest) -> Finding | None:
    """A spacing that does not start at T - 1."""
    last = len(setup.trained) - 1
    missed = {n: t for n, t in setup.first_timesteps if round(t) != last}
    if not missed or log_sigma_spacing(setup):
        return None
    spacing = setup.config.get("timestep_spacing")
    fix = {"timestep_spacing": "trailing"} if takes(setup, "timestep_spacing") and spacing != "trailing" else None
    n, t = next(iter(missed.items()))
    what = f"sampling starts from pure noise at timestep {t:g} in place of {last} ({n} steps, spacing {spacing!r})"
    return Finding("last-timestep-missed", as_published(setup), what, code(setup, fix) if fix else ours(setup), fix)


def final_alpha(setup: SchedulerUnderTest) -> Finding | None:
    """A last step that stops at the level of the first timestep, as configs of Stable Diffusion ship it."""
    final = setup.final_level
    if setup.config.get("set_alpha_to_one", True) or final is None or final.sigma == 0:
        return None
    fix = {"set_alpha_to_one": True}
    what = f"set_alpha_to_one=False leaves noise of standard deviation {float(final.sigma):.2g} in the result"
    return Finding("final-alpha", as_published(setup), what, code(setup, fix), fix)


def final_sigma(setup: SchedulerUnderTest) -> Finding | None:
    """The same for samplers in sigma."""
    if setup.config.get("final_sigmas_type") != "sigma_min":
        return None
    fix = {"final_sigmas_type": "zero"}
    what = "final_sigmas_type='sigma_min' leaves the first timestep's noise in the result"
    return Finding("final-sigma", "error", what, code(setup, fix), fix)


def log_sigma_spacing(setup: SchedulerUnderTest) -> Finding | None:
    """Spacings in log sigma (Karras, exponential, beta, Lu), of which zero SNR has no end."""
    names = [name for name in LOG_SIGMA if setup.config.get(name)]
    if not names or not setup.zero_snr:
        return None
    failing = sorted({*setup.missing, *(run.num_inference_steps for run in setup.runs if run.error is not None)})
    where = f", and fails at {listed_numbers(failing)}" if failing else ""
    fix = dict.fromkeys(names, False)
    what = f"{' and '.join(names)} spaces steps in log sigma, which is infinite at zero SNR{where}"
    return Finding("log-sigma-spacing", severity_for(failing), what, code(setup, fix), fix, tuple(failing))


def extra_timestep(setup: SchedulerUnderTest) -> Finding | None:
    """One timestep too many: an integer too far in a floating-point range."""
    extra = [run for run in setup.runs if run.timesteps and min(run.timesteps) < 0]
    if not extra:
        return None
    numbers = [run.num_inference_steps for run in extra]
    worst = max((run.missed for run in extra if run.missed is not None), default=0.0)
    lost = ", which spoils the image" if worst > TOLERANCE else ""
    what = f"stock's trailing spacing returns n + 1 timesteps, the last of them -1, at {listed_numbers(numbers)}{lost}"
    remedy = f"use another n, or:\n{ours(setup)}"
    return Finding("extra-timestep", severity_for(numbers), what, remedy, steps=tuple(numbers))


def step_size(setup: SchedulerUnderTest) -> Finding | None:
    """Steps of DDIM that are not between its own timesteps."""
    if setup.scheduler_class.__name__ not in _DDIM:
        return None
    off = {n: error for n, error in setup.wide_errors.items() if abs(error) > WRONG_STEP}
    numbers = sorted({*off, *(() if final_alpha(setup) else setup.missing)})
    if not numbers:
        return None
    worst = max(off.values(), key=abs, default=0.0)
    what = (
        f"{setup.scheduler_class.__name__} steps to t - T // n, which is not its next timestep, and misses at "
        f"{listed_numbers(numbers)} (the spread of brightness by up to {worst:+.0%})"
    )
    return Finding("step-size", severity_for(numbers), what, *to_euler(setup), tuple(numbers))


def large_variance(setup: SchedulerUnderTest) -> Finding | None:
    """The larger of DDPM's variances, which is for all T steps (Ho et al. 2020): stock adds it in the last one too."""
    if setup.config.get("variance_type") not in ("fixed_large", "fixed_large_log") or not setup.missing:
        return None
    steps = tuple(setup.missing)
    what = (
        f"variance_type={setup.config['variance_type']!r} is for all T = {len(setup.trained)} steps; in fewer, the "
        f"last one leaves noise of up to {max(setup.missing.values()):.2g}: {listed_numbers(steps)}"
    )
    return Finding("large-variance", "note", what, f"in fewer steps:\n{ours(setup)}", steps=steps)


def leaves_noise(setup: SchedulerUnderTest) -> Finding | None:
    """Any other miss of data that is one point."""
    named = (final_alpha, final_sigma, log_sigma_spacing, step_size, large_variance, rescaled_betas)
    missing = setup.missing
    if not missing or any(check(setup) for check in named):
        return None
    infinite = [n for n, missed in missing.items() if missed == math.inf]
    if infinite:
        what = f"{setup.scheduler_class.__name__} returns NaN or infinity at {listed_numbers(infinite)}"
        return Finding("not-finite", severity_for(infinite), what, *to_euler(setup), tuple(infinite))
    worst = max(missing.values())
    name = setup.scheduler_class.__name__
    what = f"{name} misses data that is one point by up to {worst:.2g} at {listed_numbers(missing)}"
    return Finding("leaves-noise", severity_for(missing), what, *to_euler(setup), tuple(missing))


def crashes(setup: SchedulerUnderTest) -> Finding | None:
    """Any other exception."""
    crashed = {run.num_inference_steps: run.error for run in setup.runs if run.error is not None}
    if not crashed or log_sigma_spacing(setup):
        return None
    what = f"{setup.scheduler_class.__name__} crashes at {listed_numbers(crashed)}: {next(iter(crashed.values()))}"
    return Finding("crashes", severity_for(crashed), what, *to_euler(setup), tuple(crashed))


def eta_one(setup: SchedulerUnderTest) -> Finding | None:
    """NaN in DDIM's step with fresh noise: a rounding error below zero under a root."""
    if setup.scheduler_class.__name__ not in _DDIM or not setup.runs or not setup.zero_snr:
        return None
    numbers = [n for n in setup.numbers if diverges_at_eta_one(setup.scheduler, setup.trained, n)]
    if not numbers:
        return None
    what = f"with eta=1 the first step is NaN at {listed_numbers(numbers)}"
    remedy = f"for fresh noise at every step:\n{ours(setup, 'ZeroSNRDDPMScheduler')}"
    return Finding("eta-one", "note", what, remedy, steps=tuple(numbers))


def half_precision_noise(setup: SchedulerUnderTest) -> Finding | None:
    """Noising in half precision that adds too little, or nothing."""
    # Samplers in sigma keep samples of another scale; steps in log sigma are of no timestep.
    in_sigma = setup.runs and float(setup.scheduler.init_noise_sigma) != 1
    if not setup.runs or in_sigma or any(setup.config.get(name) for name in LOG_SIGMA):
        return None
    n = int(setup.config.get("original_inference_steps") or len(setup.trained))
    wrong = {}
    for dtype in (torch.float16, torch.bfloat16):
        try:
            timesteps = wrong_noise(setup.scheduler, setup.trained, dtype, n)
        except Exception:  # a class without add_noise; runs tell what else is wrong
            return None
        if timesteps:
            name = str(dtype).removeprefix("torch.")
            wrong[name] = f"in {name} at {len(timesteps)} timesteps from {timesteps[0]} to {timesteps[-1]}"
    if not wrong:
        return None
    what = f"add_noise, where image to image starts, is off by more than 5% {' and '.join(wrong.values())}"
    return Finding("half-precision-noise", "note", what, f"in half precision:\n{ours(setup)}")


def not_run(setup: SchedulerUnderTest) -> Finding | None:
    """A scheduler that cannot be run here."""
    if setup.not_run is None or setup.has_no_ideal:  # which is a finding of its own
        return None
    what = f"{setup.scheduler_class.__name__} was not run: {setup.not_run}; its config alone was looked at"
    return Finding("not-run", "note", what, ours(setup))

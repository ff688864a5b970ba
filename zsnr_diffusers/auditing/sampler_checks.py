"""Checks of samplers, based on simulated runs."""

import math

import torch

from .finding import (
    LOG_SIGMA,
    Finding,
    Severity,
    accepts_argument,
    euler_advice_and_fix,
    format_step_numbers,
    from_config_line,
    replacement_line,
    severity_at_steps,
)
from .model_checks import check_rescaled_betas
from .simulate import TOLERANCE, diverges_at_eta_one, timesteps_with_wrong_noise
from .subject import SchedulerUnderTest

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
WRONG_STEP = 0.01
"""Relative error of the standard deviation of brightness that indicates a wrong step size, not rounding."""


def severity_of_published_setting(setup: SchedulerUnderTest) -> Severity:
    """Severity of a setting in Stable Diffusion's published configs: an error only at zero SNR."""
    return "error" if setup.zero_snr else "not zero-SNR"


def check_flag_ignored(setup: SchedulerUnderTest) -> Finding | None:
    """Report a scheduler class that has `rescale_betas_zero_snr` in its config but ignores it."""
    if setup.applies_zero_snr_flag:
        return None
    name = setup.scheduler_class.__name__
    what = f"{name} ignores rescale_betas_zero_snr: it samples at sqrt(alpha_bar_T) = {setup.terminal_alpha:.4g}"
    return Finding("flag-ignored", "error", what, *euler_advice_and_fix(setup))


def check_last_timestep_missed(setup: SchedulerUnderTest) -> Finding | None:
    """Report a timestep spacing whose first timestep is not T - 1."""
    last = len(setup.trained) - 1
    missed = {n: t for n, t in setup.first_timesteps if round(t) != last}
    if not missed or check_log_sigma_spacing(setup):
        return None
    spacing = setup.config.get("timestep_spacing")
    fix = (
        {"timestep_spacing": "trailing"}
        if accepts_argument(setup, "timestep_spacing") and spacing != "trailing"
        else None
    )
    n, t = next(iter(missed.items()))
    what = f"sampling starts from pure noise at timestep {t:g} instead of {last} ({n} steps, spacing {spacing!r})"
    return Finding(
        "last-timestep-missed",
        severity_of_published_setting(setup),
        what,
        from_config_line(setup, fix) if fix else replacement_line(setup),
        fix,
    )


def check_final_alpha(setup: SchedulerUnderTest) -> Finding | None:
    """Report `set_alpha_to_one=False`, which ends the last step at timestep 0's noise level instead of clean data."""
    final = setup.final_level
    if setup.config.get("set_alpha_to_one", True) or final is None or final.sigma == 0:
        return None
    fix = {"set_alpha_to_one": True}
    what = f"set_alpha_to_one=False leaves noise of standard deviation {float(final.sigma):.2g} in the result"
    return Finding("final-alpha", severity_of_published_setting(setup), what, from_config_line(setup, fix), fix)


def check_final_sigma(setup: SchedulerUnderTest) -> Finding | None:
    """Report `final_sigmas_type="sigma_min"`, which makes sigma-based samplers end at timestep 0's noise level."""
    if setup.config.get("final_sigmas_type") != "sigma_min":
        return None
    fix = {"final_sigmas_type": "zero"}
    what = "final_sigmas_type='sigma_min' leaves the first timestep's noise in the result"
    return Finding("final-sigma", "error", what, from_config_line(setup, fix), fix)


def check_log_sigma_spacing(setup: SchedulerUnderTest) -> Finding | None:
    """Report Karras, exponential, beta or Lu spacing at zero SNR, where log(sigma) is infinite."""
    names = [name for name in LOG_SIGMA if setup.config.get(name)]
    if not names or not setup.zero_snr:
        return None
    failing = sorted(
        {*setup.point_errors, *(run.num_inference_steps for run in setup.simulations if run.error is not None)}
    )
    where = f", and fails at {format_step_numbers(failing)}" if failing else ""
    fix = dict.fromkeys(names, False)
    what = f"{' and '.join(names)} spaces steps in log(sigma), which is infinite at zero SNR{where}"
    return Finding(
        "log-sigma-spacing", severity_at_steps(failing), what, from_config_line(setup, fix), fix, tuple(failing)
    )


def check_extra_timestep(setup: SchedulerUnderTest) -> Finding | None:
    """Report trailing spacing with n + 1 timesteps, the last of them -1: a rounding error in diffusers."""
    extra = [run for run in setup.simulations if run.timesteps and min(run.timesteps) < 0]
    if not extra:
        return None
    numbers = [run.num_inference_steps for run in extra]
    worst = max((run.missed for run in extra if run.missed is not None), default=0.0)
    lost = ", which spoils the image" if worst > TOLERANCE else ""
    what = (
        "diffusers' trailing spacing returns n + 1 timesteps, the last of them -1, at "
        f"{format_step_numbers(numbers)}{lost}"
    )
    remedy = f"use another n, or:\n{replacement_line(setup)}"
    return Finding("extra-timestep", severity_at_steps(numbers), what, remedy, steps=tuple(numbers))


def check_step_size(setup: SchedulerUnderTest) -> Finding | None:
    """Report DDIM steps to t - T // n instead of the next timestep."""
    if setup.scheduler_class.__name__ not in _DDIM:
        return None
    off = {n: error for n, error in setup.wide_errors.items() if abs(error) > WRONG_STEP}
    numbers = sorted({*off, *(() if check_final_alpha(setup) else setup.point_errors)})
    if not numbers:
        return None
    worst = max(off.values(), key=abs, default=0.0)
    what = (
        f"{setup.scheduler_class.__name__} steps to t - T // n, which is not its next timestep, and misses at "
        f"{format_step_numbers(numbers)} (the standard deviation of brightness by up to {worst:+.0%})"
    )
    return Finding("step-size", severity_at_steps(numbers), what, *euler_advice_and_fix(setup), tuple(numbers))


def check_large_variance(setup: SchedulerUnderTest) -> Finding | None:
    """Note DDPM's `fixed_large` variance (Ho et al. 2020), which leaves noise with fewer than T steps."""
    if setup.config.get("variance_type") not in ("fixed_large", "fixed_large_log") or not setup.point_errors:
        return None
    steps = tuple(setup.point_errors)
    what = (
        f"variance_type={setup.config['variance_type']!r} is for all T = {len(setup.trained)} steps; with fewer, the "
        f"last one leaves noise of up to {max(setup.point_errors.values()):.2g}: {format_step_numbers(steps)}"
    )
    return Finding("large-variance", "note", what, f"with fewer steps:\n{replacement_line(setup)}", steps=steps)


def check_leaves_noise(setup: SchedulerUnderTest) -> Finding | None:
    """Report a sampler that misses single-point data if no other check names the cause."""
    named = (
        check_final_alpha,
        check_final_sigma,
        check_log_sigma_spacing,
        check_step_size,
        check_large_variance,
        check_rescaled_betas,
    )
    missing = setup.point_errors
    if not missing or any(check(setup) for check in named):
        return None
    infinite = [n for n, missed in missing.items() if missed == math.inf]
    if infinite:
        what = f"{setup.scheduler_class.__name__} returns NaN or infinity at {format_step_numbers(infinite)}"
        return Finding("not-finite", severity_at_steps(infinite), what, *euler_advice_and_fix(setup), tuple(infinite))
    worst = max(missing.values())
    name = setup.scheduler_class.__name__
    what = f"{name} misses single-point data by up to {worst:.2g} at {format_step_numbers(missing)}"
    return Finding("leaves-noise", severity_at_steps(missing), what, *euler_advice_and_fix(setup), tuple(missing))


def check_crashes(setup: SchedulerUnderTest) -> Finding | None:
    """Report exceptions of simulated runs that spacing in log(sigma) does not explain."""
    crashed = {run.num_inference_steps: run.error for run in setup.simulations if run.error is not None}
    if not crashed or check_log_sigma_spacing(setup):
        return None
    what = (
        f"{setup.scheduler_class.__name__} crashes at {format_step_numbers(crashed)}: {next(iter(crashed.values()))}"
    )
    return Finding("crashes", severity_at_steps(crashed), what, *euler_advice_and_fix(setup), tuple(crashed))


def check_eta_one(setup: SchedulerUnderTest) -> Finding | None:
    """Note DDIM's NaN at eta=1, where rounding makes the variance under a square root negative."""
    if setup.scheduler_class.__name__ not in _DDIM or not setup.simulations or not setup.zero_snr:
        return None
    numbers = [n for n in setup.numbers if diverges_at_eta_one(setup.scheduler, setup.trained, n)]
    if not numbers:
        return None
    what = f"with eta=1 the first step is NaN at {format_step_numbers(numbers)}"
    remedy = f"to add noise at every step:\n{replacement_line(setup, 'ZeroSNRDDPMScheduler')}"
    return Finding("eta-one", "note", what, remedy, steps=tuple(numbers))


def check_half_precision_noise(setup: SchedulerUnderTest) -> Finding | None:
    """Note timesteps at which `add_noise` in float16 or bfloat16 adds too little noise, or none."""
    # Sigma-based samplers scale samples differently; steps in log(sigma) do not correspond to timesteps.
    in_sigma = setup.simulations and float(setup.scheduler.init_noise_sigma) != 1
    if not setup.simulations or in_sigma or any(setup.config.get(name) for name in LOG_SIGMA):
        return None
    n = int(setup.config.get("original_inference_steps") or len(setup.trained))
    wrong = {}
    for dtype in (torch.float16, torch.bfloat16):
        try:
            timesteps = timesteps_with_wrong_noise(setup.scheduler, setup.trained, dtype, n)
        except Exception:  # a class without add_noise; simulated runs report anything else
            return None
        if timesteps:
            name = str(dtype).removeprefix("torch.")
            wrong[name] = f"in {name} at {len(timesteps)} timesteps from {timesteps[0]} to {timesteps[-1]}"
    if not wrong:
        return None
    what = f"add_noise, where image-to-image starts, is off by more than 5% {' and '.join(wrong.values())}"
    return Finding("half-precision-noise", "note", what, f"in half precision:\n{replacement_line(setup)}")


def check_not_run(setup: SchedulerUnderTest) -> Finding | None:
    """Note that the scheduler was not simulated, and why."""
    if setup.skip_reason is None or setup.has_no_ideal_network:  # a separate check reports this
        return None
    what = f"{setup.scheduler_class.__name__} was not run: {setup.skip_reason}; only its config was checked"
    return Finding("not-run", "note", what, replacement_line(setup))

"""Faults of samplers, told by running them."""

from collections.abc import Iterable, Iterator

import torch

from .finding import LOG_SIGMA, Finding, Severity, code, ours, takes, to_euler
from .runs import TOLERANCE, Run, diverges_at_eta_one, wrong_noise
from .setup import SHOWN, Setup

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")


def _listed(numbers: Iterable[int]) -> str:
    """A few numbers of steps, and how many there are."""
    found = list(numbers)
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return f"n = {', '.join(map(str, found[:6]))}{more}"


def _by_numbers(numbers: Iterable[int]) -> Severity:
    return "error" if set(numbers) & set(SHOWN) else "note"


def flag_ignored(setup: Setup) -> Finding | None:
    """A class that keeps the flag in its config and has the schedule without it."""
    if setup.honours_flag:
        return None
    name = setup.scheduler_class.__name__
    what = f"{name} ignores rescale_betas_zero_snr: it samples at sqrt(alpha_bar_T) = {setup.terminal_alpha:.4g}"
    return Finding("flag-ignored", "error", what, *to_euler(setup))


def last_timestep_missed(setup: Setup) -> Finding | None:
    """A spacing that does not start at T - 1."""
    last = len(setup.trained) - 1
    missed = {n: t for n, t in setup.first_timesteps.items() if round(t) != last}
    if not missed or log_sigma_spacing(setup):
        return None
    spacing = setup.config.get("timestep_spacing")
    fix = {"timestep_spacing": "trailing"} if takes(setup, "timestep_spacing") and spacing != "trailing" else None
    n, t = next(iter(missed.items()))
    what = f"sampling starts from pure noise at timestep {t:g} in place of {last} ({n} steps, spacing {spacing!r})"
    severity: Severity = "error" if setup.zero_snr else "not zero-SNR"
    return Finding("last-timestep-missed", severity, what, code(setup, fix) if fix else ours(setup), fix)


def final_alpha(setup: Setup) -> Finding | None:
    """A last step that stops at the level of the first timestep, as configs of Stable Diffusion ship it."""
    final = getattr(setup.scheduler, "final_alpha_cumprod", None)
    if setup.config.get("set_alpha_to_one", True) or final is None or float(final) == 1:
        return None
    fix = {"set_alpha_to_one": True}
    sigma = (1 - float(final)) ** 0.5
    what = f"set_alpha_to_one=False leaves noise of standard deviation {sigma:.2g} in the result"
    return Finding("final-alpha", "error", what, code(setup, fix), fix)


def final_sigma(setup: Setup) -> Finding | None:
    """The same for samplers in sigma."""
    if setup.config.get("final_sigmas_type") != "sigma_min":
        return None
    fix = {"final_sigmas_type": "zero"}
    what = "final_sigmas_type='sigma_min' leaves the first timestep's noise in the result"
    return Finding("final-sigma", "error", what, code(setup, fix), fix)


def log_sigma_spacing(setup: Setup) -> Finding | None:
    """Spacings in log sigma (Karras, exponential, beta, Lu), of which zero SNR has no end."""
    names = [name for name in LOG_SIGMA if setup.config.get(name)]
    if not names or not setup.zero_snr:
        return None
    failing = [r.num_inference_steps for r in setup.runs if _failed(r)]
    where = f", and fails at {_listed(failing)}" if failing else ""
    fix = dict.fromkeys(names, False)
    what = f"{' and '.join(names)} spaces steps in log sigma, which is infinite at zero SNR{where}"
    return Finding("log-sigma-spacing", _by_numbers(failing), what, code(setup, fix), fix)


def _failed(run: Run) -> bool:
    return run.missed is None or not run.missed <= TOLERANCE


def _regular(setup: Setup) -> Iterator[Run]:
    """Runs that visit timesteps of the model only."""
    yield from (run for run in setup.runs if run.error is not None or min(run.timesteps) >= 0)


def extra_timestep(setup: Setup) -> Finding | None:
    """One timestep too many: an integer too far in a floating-point range."""
    extra = [run for run in setup.runs if run.timesteps and min(run.timesteps) < 0]
    if not extra:
        return None
    numbers = [run.num_inference_steps for run in extra]
    worst = max((run.missed for run in extra if run.missed is not None), default=0.0)
    lost = ", which spoils the picture" if worst > TOLERANCE else ""
    what = f"stock's trailing spacing returns n + 1 timesteps, the last of them -1, at {_listed(numbers)}{lost}"
    return Finding("extra-timestep", _by_numbers(numbers), what, f"use another n, or: {ours(setup)}")


def step_size(setup: Setup) -> Finding | None:
    """Steps of DDIM that are not between its own timesteps."""
    if setup.scheduler_class.__name__ not in _DDIM:
        return None
    off = {}
    for run in _regular(setup):
        if run.wide is not None and all(t == int(t) for t in run.timesteps):
            exact = setup.exact(run).wide
            if exact and abs(run.wide / exact - 1) > 0.01:
                off[run.num_inference_steps] = run.wide / exact - 1
    numbers = sorted({*off, *(() if final_alpha(setup) else _missing(setup))})
    if not numbers:
        return None
    worst = max(off.values(), key=abs, default=0.0)
    what = (
        f"{setup.scheduler_class.__name__} steps to t - T // n, which is not its next timestep, and misses at "
        f"{_listed(numbers)} (the spread of brightness by up to {worst:+.0%})"
    )
    return Finding("step-size", _by_numbers(numbers), what, *to_euler(setup))


def _missing(setup: Setup) -> list[int]:
    """Numbers of steps that end away from the point."""
    return [r.num_inference_steps for r in _regular(setup) if r.missed is not None and not r.missed <= TOLERANCE]


def leaves_noise(setup: Setup) -> Finding | None:
    """Any other miss of data that is one point."""
    named = (final_alpha, final_sigma, log_sigma_spacing, step_size)
    missing = _missing(setup)
    if not missing or any(check(setup) for check in named):
        return None
    by_number = {run.num_inference_steps: run.missed for run in setup.runs}
    infinite = [n for n in missing if by_number[n] == float("inf")]
    if infinite:
        what = f"{setup.scheduler_class.__name__} returns NaN or infinity at {_listed(infinite)}"
        return Finding("not-finite", _by_numbers(infinite), what, *to_euler(setup))
    worst = max(by_number[n] or 0.0 for n in missing)
    what = f"{setup.scheduler_class.__name__} misses data that is one point by up to {worst:.2g} at {_listed(missing)}"
    return Finding("leaves-noise", _by_numbers(missing), what, *to_euler(setup))


def crashes(setup: Setup) -> Finding | None:
    """Any other exception."""
    crashed = {run.num_inference_steps: run.error for run in setup.runs if run.error is not None}
    if not crashed or log_sigma_spacing(setup):
        return None
    what = f"{setup.scheduler_class.__name__} crashes at {_listed(crashed)}: {next(iter(crashed.values()))}"
    return Finding("crashes", _by_numbers(crashed), what, *to_euler(setup))


def eta_one(setup: Setup) -> Finding | None:
    """NaN in DDIM's step with fresh noise: a rounding error below zero under a root."""
    if setup.scheduler_class.__name__ not in _DDIM or not setup.runs or not setup.zero_snr:
        return None
    numbers = [n for n in setup.numbers if diverges_at_eta_one(setup.scheduler, setup.trained, n)]
    if not numbers:
        return None
    what = f"with eta=1 the first step is NaN at {_listed(numbers)}"
    remedy = f"for fresh noise at every step: {ours(setup, 'ZeroSNRDDPMScheduler')}"
    return Finding("eta-one", "note", what, remedy)


def half_precision_noise(setup: Setup) -> Finding | None:
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
    return Finding("half-precision-noise", "note", what, f"in half precision: {ours(setup)}")


def not_run(setup: Setup) -> Finding | None:
    """A scheduler that cannot be run here."""
    if setup.not_run is None or setup.has_no_ideal:  # which is a finding of its own
        return None
    what = f"{setup.scheduler_class.__name__} was not run: {setup.not_run}; its config alone was looked at"
    return Finding("not-run", "note", what, ours(setup))

"""The samplers that the benchmarks compare: ours, stock's in every combination of options, and those of others."""

import inspect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from rivals import (
    GRIDS,
    FlowGradientEstimationScheduler,
    FlowIPNDMScheduler,
    FlowLMSScheduler,
    FlowUniPCBH2Scheduler,
    GradientEstimationScheduler,
    IPNDMScheduler,
    LMSScheduler,
    UniPCBH2Scheduler,
)
from suites import Suite
from torch import Tensor

from zsnr_diffusers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)
from zsnr_diffusers.core import alpha_bar_table, enforce_zero_terminal_snr

SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MODEL: dict[str, Any] = {**SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
UNBOUNDED: dict[str, Any] = {"clip_sample": False, "snr_shift_scale": 1.0}
"""For stock classes that clip, or that shift the schedule, unless told not to."""
BACKWARDS = {"DDIMInverseScheduler"}
"""Leads from data to noise."""
ANCESTRAL = {
    "CogVideoXDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
}
"""Add fresh noise whatever their options."""
SOLVER_TYPES = {"DPMSolverMultistepScheduler": ("midpoint", "heun"), "UniPCMultistepScheduler": ("bh1", "bh2")}
CHOICES: dict[str, Sequence[Any]] = {
    "timestep_spacing": ("trailing", "linspace", "leading"),
    "solver_order": (1, 2, 3),
    "final_sigmas_type": ("zero", "sigma_min"),
    "lower_order_final": (True, False),
    "predict_x0": (True, False),
    "interpolation_type": ("linear", "log_linear"),
    "set_alpha_to_one": (True, False),
}
SAME_LEVELS = {"solver_order", "solver_type", "algorithm_type", *CHOICES} - {"timestep_spacing"}
"""Options that tell runs over the same noise levels apart."""


def zero_snr_schedule() -> Tensor:
    """The schedule of all samplers here, shape [1000]; stock's warnings of options on their way out are silenced."""
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    table = alpha_bar_table(SCHEDULE["beta_schedule"], 1000, SCHEDULE["beta_start"], SCHEDULE["beta_end"])
    return enforce_zero_terminal_snr(table)


class Sampler(NamedTuple):
    """A scheduler class and what it is made with, the model's facts apart."""

    cls: type[Any]
    options: dict[str, Any]
    model: dict[str, Any] = MODEL

    @property
    def reaches_clean_data(self) -> bool:
        """Whether the last step leads there, rather than to the noise level of timestep 0."""
        return self.options.get("final_sigmas_type") != "sigma_min" and self.options.get("set_alpha_to_one", True)

    @property
    def label(self) -> str:
        """The class, spacing and order, and every option that is not the class's default."""
        defaults = inspect.signature(self.cls.__init__).parameters
        words = [self.cls.__name__.removesuffix("Scheduler").replace("Discrete", "").replace("SolverMultistep", "")]
        for key, value in self.options.items():
            if key == "solver_order":
                words.append(f"order {value}")
            elif key == "timestep_spacing" or (isinstance(value, str) and value != defaults[key].default):
                words.append(value)
            elif isinstance(value, bool) and value != defaults[key].default:
                words.append(key.removeprefix("use_").replace("_", " ") if value else f"no {key}")
            elif key in ("eta", "shift", "flow_shift"):
                words.append(f"{key.removeprefix('flow_')} {value:g}")
        return " ".join(words)

    def prepared(self, n: int) -> Any:
        """The scheduler, about to take n steps."""
        accepted = inspect.signature(self.cls.__init__).parameters
        unbounded = {key: value for key, value in UNBOUNDED.items() if key in accepted}
        scheduler = self.cls(**self.model, **unbounded, **self.options)
        # Heun's method calls the network twice in all steps but the last.
        scheduler.set_timesteps(n // 2 + 1 if "Heun" in self.cls.__name__ else n)
        return scheduler


DEFAULT = Sampler(ZeroSNRMultistepScheduler, {"timestep_spacing": "kappa"})


USUAL = {
    "stock DDIM": Sampler(diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}),
    "stock DPM++ 2M": Sampler(diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "stock DPM++ 2M Lu": Sampler(
        diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "use_lu_lambdas": True}
    ),
    "stock UniPC": Sampler(diffusers.UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
}
"""What people use, with default options."""
USUAL_RIVALS = [
    Sampler(LMSScheduler, {"timestep_spacing": "beta", "solver_order": 4}),
    Sampler(IPNDMScheduler, {"timestep_spacing": "beta", "solver_order": 4}),
    Sampler(GradientEstimationScheduler, {"timestep_spacing": "beta"}),
    Sampler(UniPCBH2Scheduler, {"timestep_spacing": "beta", "solver_order": 3}),
]
"""What people use in other programs, likewise."""


def our_samplers() -> list[Sampler]:
    """Deterministic ones, `DEFAULT` first."""
    orders = itertools.product(("kappa", "trailing"), (None, 2, 1), (True, False))
    return [
        *(
            Sampler(ZeroSNRMultistepScheduler, multistep_options(where, order, corrector))
            for where, order, corrector in orders
        ),
        *(Sampler(ZeroSNRDDIMScheduler, {"timestep_spacing": where}) for where in ("kappa", "trailing")),
        Sampler(ZeroSNRPNDMScheduler, {"timestep_spacing": "trailing"}),
    ]


def multistep_options(where: str, order: int | None = None, corrector: bool = True, **others: Any) -> dict[str, Any]:
    """What `ZeroSNRMultistepScheduler` is made with; None is the default order."""
    highest = {} if order is None else {"solver_order": order}
    return {"timestep_spacing": where, **highest, **({} if corrector else {"corrector": False}), **others}


def stock_samplers(stochastic: bool) -> list[Sampler]:
    """Every scheduler of diffusers that knows zero terminal SNR, in every combination of options it accepts.

    The stochastic ones only in those that change where the steps are, and their order.
    """
    samplers = []
    for name in sorted(set(dir(diffusers)) - BACKWARDS):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") else None  # the rest takes long to import
        accepted = inspect.signature(cls.__init__).parameters if inspect.isclass(cls) else {}
        if "rescale_betas_zero_snr" not in accepted or (name in ANCESTRAL and not stochastic):
            continue
        choices = {key: values for key, values in CHOICES.items() if key in accepted}
        if name in SOLVER_TYPES:
            choices["solver_type"] = SOLVER_TYPES[name]
        if stochastic:
            choices = {k: v if k in ("timestep_spacing", "solver_order") else v[:1] for k, v in choices.items()}
        if "algorithm_type" in accepted:
            choices["algorithm_type"] = ("sde-dpmsolver++",) if stochastic else ("dpmsolver++", "dpmsolver")
        elif stochastic and name not in ANCESTRAL:
            continue
        sigmas = [
            k for k in accepted if k.startswith("use_") and k.endswith(("_sigmas", "_lambdas")) and "flow" not in k
        ]
        for values, where in itertools.product(itertools.product(*choices.values()), [None, *sigmas]):
            sampler = Sampler(cls, {**dict(zip(choices, values, strict=True)), **({where: True} if where else {})})
            if sampler.options.get("algorithm_type") != "dpmsolver" or sampler.options["final_sigmas_type"] != "zero":
                samplers.append(sampler)  # the rest refuses the combination
    return samplers


def rival_samplers() -> list[Sampler]:
    """Those that other programs have, on each of their grids, of each order, with both kinds of last step."""
    samplers = []
    for where, order in itertools.product(GRIDS, (2, 3, 4)):
        options = {"timestep_spacing": where, "solver_order": order}
        for cls, plain in itertools.product((LMSScheduler, IPNDMScheduler), (False, True)):
            samplers.append(Sampler(cls, {**options, "lower_order_final": plain}))
        if order < 4:  # its fourth order is not in use anywhere
            samplers.append(Sampler(UniPCBH2Scheduler, options))
    for where, plain in itertools.product(GRIDS, (False, True)):
        samplers.append(Sampler(GradientEstimationScheduler, {"timestep_spacing": where, "lower_order_final": plain}))
    return samplers


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""Of stock's schedulers for either kind of model; those for flow matching alone need no facts."""
SHIFTS = (1.0, 1.5, 3.0, 7.0)
FLOW_DEFAULT = Sampler(FlowMatchMultistepScheduler, {"timestep_spacing": "kappa"}, {})


def our_flow_samplers() -> list[Sampler]:
    """Deterministic ones, `FLOW_DEFAULT` first."""
    orders = [("kappa", None), ("kappa", 2), ("kappa", 1), ("trailing", None), ("trailing", 2)]
    return [
        *(Sampler(FlowMatchMultistepScheduler, multistep_options(*choice), {}) for choice in orders),
        Sampler(FlowMatchEulerScheduler, {"timestep_spacing": "trailing"}, {}),
    ]


def stock_flow_samplers() -> list[Sampler]:
    """Every deterministic scheduler of diffusers for flow matching, at each of `SHIFTS`, in each spacing and order."""
    samplers = []
    sigmas: tuple[dict[str, Any], ...] = (
        {},
        *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")),
    )
    for shift, where in itertools.product(SHIFTS, sigmas):
        samplers.append(Sampler(diffusers.FlowMatchEulerDiscreteScheduler, {"shift": shift, **where}, {}))
    samplers += [Sampler(diffusers.FlowMatchHeunDiscreteScheduler, {"shift": shift}, {}) for shift in SHIFTS]
    for cls in (
        diffusers.UniPCMultistepScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.DEISMultistepScheduler,
    ):
        accepted = inspect.signature(cls.__init__).parameters
        kinds = SOLVER_TYPES.get(cls.__name__, (None,))
        finals = [k for k in ("lower_order_final",) if k in accepted]
        for shift, order, kind, plain in itertools.product(SHIFTS, (1, 2, 3), kinds, (True, False)):
            options = {"flow_shift": shift, "solver_order": order, **({"solver_type": kind} if kind else {})}
            samplers.append(Sampler(cls, {**options, **dict.fromkeys(finals, plain)}, FLOW))
    return samplers


def rival_flow_samplers() -> list[Sampler]:
    """Those that other programs have, at shift 1 and 3, on each of their grids, of each order."""
    samplers = []
    for where, shift, plain in itertools.product(GRIDS, (1.0, 3.0), (False, True)):
        options = {"timestep_spacing": where, "shift": shift, "lower_order_final": plain}
        for cls, order in itertools.product((FlowLMSScheduler, FlowIPNDMScheduler), (2, 3, 4)):
            samplers.append(Sampler(cls, {**options, "solver_order": order}, {}))
        samplers.append(Sampler(FlowGradientEstimationScheduler, options, {}))
    for where, shift, order in itertools.product(GRIDS, (1.0, 3.0), (2, 3)):
        options = {"timestep_spacing": where, "shift": shift, "solver_order": order}
        samplers.append(Sampler(FlowUniPCBH2Scheduler, options, {}))
    return samplers


def skrample_flow_samplers() -> list[Sampler]:
    """Those of the library skrample at each of `SHIFTS`, by solver, order, schedule, and what the solver interpolates.

    Raises:
        SystemExit: it is not installed, or this Python is older than it asks for.
    """
    try:
        from skrample_samplers import SkrampleScheduler, skrample_options
    except (ImportError, SyntaxError) as problem:
        raise SystemExit(
            f"--skrample needs that library: python -m pip install skrample==0.7.0, on Python 3.12 ({problem})."
        ) from problem
    return [Sampler(SkrampleScheduler, options, {}) for options in skrample_options(SHIFTS)]


def sample(scheduler: Any, suite: Suite, generator: torch.Generator | None = None) -> Tensor:
    """The rows that a prepared scheduler makes of the suite's noise."""
    x, previous_x_0, previous_t = suite.noise * float(getattr(scheduler, "init_noise_sigma", 1.0)), None, None
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if "generator" in accepted else {}
    for t in scheduler.timesteps:
        v = suite.velocity(scaled(x, t), float(t))
        if "timestep_back" in accepted:  # CogVideoXDPM has its history handed to it
            x, previous_x_0 = scheduler.step(v, previous_x_0, t, previous_t, x, **noise)
            previous_t = t
        else:
            x = scheduler.step(v, t, x, **noise).prev_sample
    if not bool(x.isfinite().all()):
        raise ArithmeticError("NaN")
    return x

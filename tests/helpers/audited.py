"""What the tests of audits share: configs with and without faults, and samplers run on one point."""

import inspect
import json

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from oracles import POINT, SD, levels

RELEASED = {
    **SD,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
"""The scheduler config of the weights that the paper's authors released, of `DDIMScheduler`."""

STEPS = (1, 2, 5, 20, 28, 50)


def config_of(scheduler_class, **changes):
    """A scheduler config as a file has it: the released one, as far as the class takes it."""
    accepted = inspect.signature(scheduler_class.__init__).parameters
    config = {key: value for key, value in RELEASED.items() if key in accepted}
    return {"_class_name": scheduler_class.__name__, **config, **changes}


def found(result, name):
    (finding,) = [finding for finding in result.findings if finding.name == name]
    return finding


def names(result):
    return {finding.name for finding in result.findings}


def misses(scheduler, numbers=STEPS, zero_snr=True, T=1000):
    """Step counts at which a scheduler does not reach data that is one point."""
    alphas, sigmas = levels(T, zero_snr)
    for n in numbers:
        scheduler.set_timesteps(n)
        x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen, alpha, sigma = scheduler.scale_model_input(x, t), alphas[int(t)], sigmas[int(t)]
            noise = (seen - alpha * POINT) / sigma
            output = noise if scheduler.config.prediction_type == "epsilon" else alpha * noise - sigma * POINT
            x = scheduler.step(output, t, x, return_dict=False)[0]
        # Stock stands in for SNR 0 with 2^-24, which leaves 2^-12 of the noise if there is but one step.
        if not abs(x.item() - POINT) < (1e-3 if n == 1 else 1e-4):
            yield n


RESCALED = DDIMScheduler(**RELEASED).betas.tolist()

PLANTED = {
    "leading": (config_of(DDIMScheduler, timestep_spacing="leading"), "last-timestep-missed", "error"),
    "no final alpha": (config_of(DDIMScheduler, set_alpha_to_one=False), "final-alpha", "error"),
    "28 steps of DDIM": (config_of(DDIMScheduler), "step-size", "note"),
    "sigma_min": (config_of(DPMSolverMultistepScheduler, final_sigmas_type="sigma_min"), "final-sigma", "error"),
    "Karras": (config_of(DPMSolverMultistepScheduler, use_karras_sigmas=True), "log-sigma-spacing", "error"),
    "exponential": (config_of(UniPCMultistepScheduler, use_exponential_sigmas=True), "log-sigma-spacing", "error"),
    "beta": (config_of(DPMSolverMultistepScheduler, use_beta_sigmas=True), "log-sigma-spacing", "error"),
    "Lu": (config_of(DPMSolverMultistepScheduler, use_lu_lambdas=True), "log-sigma-spacing", "error"),
    "betas for a flag": (
        config_of(DDIMScheduler, rescale_betas_zero_snr=False, trained_betas=RESCALED),
        "rescaled-betas",
        "note",
    ),
    "betas for a flag, in sigma": (
        config_of(EulerDiscreteScheduler, rescale_betas_zero_snr=False, trained_betas=RESCALED),
        "rescaled-betas",
        "error",
    ),
}


def write(folder, config=None, index=None):
    """Change the two files of a pipeline's folder."""
    for path, changes in (
        (folder / "scheduler" / "scheduler_config.json", config),
        (folder / "model_index.json", index),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **(changes or {})}))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stock_flow_findings(**options):
    """What an audit finds of `UniPCMultistepScheduler` over flow times: diffusers 0.35 also starts below noise."""
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **options)
    scheduler.set_timesteps(10)
    return {"cut-timesteps"} | ({"first-step-below-noise"} if scheduler.sigmas[0] < 0.9999 else set())

"""The samplers under test, and networks whose right results are known."""

from itertools import pairwise

import torch
from hypothesis import strategies as st

from zsnr_diffusers import (
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
    enforce_zero_terminal_snr,
)
from zsnr_diffusers.core import alpha_bar_table
from zsnr_diffusers.core.noise import BETA_SCHEDULES

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {**BETAS, "prediction_type": "v_prediction"}
CLASSES = [
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRDDIMInverseScheduler,
]
SAMPLERS = {
    "ddim": (ZeroSNRDDIMScheduler, {}),
    "ddpm": (ZeroSNRDDPMScheduler, {}),
    "multistep": (ZeroSNRMultistepScheduler, {}),
    "multistep-order-1": (ZeroSNRMultistepScheduler, {"solver_order": 1}),
    "multistep-order-2": (ZeroSNRMultistepScheduler, {"solver_order": 2}),
    "multistep-no-corrector": (ZeroSNRMultistepScheduler, {"corrector": False}),
    "multistep-sde": (ZeroSNRMultistepScheduler, {"eta": 1.0}),
    "pndm": (ZeroSNRPNDMScheduler, {}),
    "lcm": (ZeroSNRLCMScheduler, {}),
    "inverse": (ZeroSNRDDIMInverseScheduler, {}),
}
NOISY = {"ddpm", "multistep-sde", "lcm"}
"""Samplers that draw fresh noise."""

POINT, MEAN, SPREAD = 0.7, -0.4, 2.0


def make(name, **config):
    """One of `SAMPLERS`, of a v-prediction model with the betas of Stable Diffusion unless told otherwise."""
    cls, own = SAMPLERS[name]
    return cls(**{**SD, **own, **config})


def levels(num_train_timesteps=1000, zero_snr=True, **schedule):
    """alpha and sigma of every timestep, float64, straight from the core."""
    table = alpha_bar_table(num_train_timesteps=num_train_timesteps, **{**BETAS, **schedule})
    table = enforce_zero_terminal_snr(table) if zero_snr else table
    return table.sqrt().tolist(), (1 - table).sqrt().tolist()


def sample(scheduler, x, network, n, **kwargs):
    """The loop of a pipeline; `network(x, t)` returns the model output."""
    scheduler.set_timesteps(n)
    return run(scheduler, x, network, **kwargs)


def run(scheduler, x, network, begin=0, **kwargs):
    """The loop over the timesteps that are set, from the one at `begin` on."""
    for t in scheduler.timesteps[begin:].tolist():
        x = scheduler.step(network(x, t), t, x, return_dict=False, **kwargs)[0]
    return x


def oracle(num_train_timesteps):
    """v of the exact posterior mean for a point mass (sample 0) and for Gaussian data (sample 1)."""
    alphas, sigmas = levels(num_train_timesteps)
    prior = torch.tensor([POINT, MEAN], dtype=torch.float64)
    variance = torch.tensor([0.0, SPREAD**2], dtype=torch.float64)

    def network(x, t):
        alpha, sigma = alphas[t], sigmas[t]
        x_0 = posterior_mean(x, alpha, sigma, prior, variance)
        return alpha * (x - alpha * x_0) / sigma - sigma * x_0

    return network


def posterior_mean(x, alpha, sigma, mean, variance):
    """Of Gaussian data, given x = alpha x_0 + sigma noise."""
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)


def nonlinear(x, t):
    """A network that nobody trained."""
    return torch.sin(x + 0.001 * t) - 0.2 * x


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def start(*shape, seed=7, dtype=torch.float32):
    return torch.randn(shape or (2, 3), generator=seeded(seed), dtype=dtype)


def run_to_the_point(scheduler, x, alphas, sigmas, begin=0, **kwargs):
    """A run on data that is one point, with the rounding error that such a run may have at most.

    The network returns v of the point, exact for the very sample that it is given, in that sample's dtype. So x_0 is
    the point up to rounding, whatever errors the sample has; these reach the result only by the `keep` of later steps.

    Returns:
        the result, the bound on its error, and the number of network calls.
    """
    visited = scheduler.timesteps[begin:].tolist()
    seen, outputs = [x], []
    for t in visited:
        wide = x.double()
        outputs.append((alphas[t] * (wide - alphas[t] * POINT) / sigmas[t] - sigmas[t] * POINT).to(x.dtype))
        x = scheduler.step(outputs[-1], t, x, return_dict=False, **kwargs)[0]
        seen.append(x)

    rounding = torch.finfo(x.dtype).eps / 2
    arithmetic = 8 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps / 2  # operations that round, at most
    sizes = torch.stack(seen).double().abs().amax(dim=1).tolist()
    largest_v = torch.stack(outputs).double().abs().amax(dim=1).tolist()
    terms = max(size * alphas[t] + v * sigmas[t] for size, v, t in zip(sizes, largest_v, visited, strict=False))
    bound = 0.0
    updates = scheduler._updates_from(begin, kwargs.get("eta", scheduler._eta))
    for update, (size, following) in zip(updates, pairwise(sizes), strict=True):
        gain = sum(map(abs, update.gains))
        bound = update.keep * bound + rounding * following
        bound += arithmetic * update.keep * size + (rounding + arithmetic) * gain * terms
    return x, bound, len(outputs)


def misses(name, dtype, numbers):
    """Step counts that do not make n calls at n right timesteps, or miss the point by more than rounding costs.

    An image of one point is inverted to the noise that a sample of that value holds at the first level.
    """
    scheduler, (alphas, sigmas) = make(name), levels()
    inverse = name == "inverse"
    start = torch.tensor([POINT] if inverse else [2.0, -1.0, 0.3], dtype=torch.float64).to(dtype)
    for n in numbers:
        scheduler.set_timesteps(n)
        visited = scheduler.timesteps.tolist()
        first = visited[0]
        wanted = (1 - alphas[first]) * POINT / sigmas[first] if inverse else POINT
        extra = {"generator": seeded(n)} if name in NOISY else {}
        result, bound, calls = run_to_the_point(scheduler, start, alphas, sigmas, **extra)
        error = (result.double() - wanted).abs().max().item()
        if not (calls == n and are_right(visited, n, inverse) and error <= bound):  # which NaN is not
            yield n, calls, error, bound


def are_right(visited, n, inverse, T=1000):
    """n whole timesteps in [0, T-1], strictly decreasing from T-1, or for inversion increasing to it."""
    down = visited[::-1] if inverse else visited
    decrease = all(a > b for a, b in pairwise(down))
    return len(down) == n and all(type(t) is int for t in down) and down[0] == T - 1 and down[-1] >= 0 and decrease


@st.composite
def runs(draw):
    """A sampler with any options on any schedule, its timesteps set, and the place where the run begins."""
    name = draw(st.sampled_from(["ddim", "ddpm", "multistep", "pndm", "lcm"]))
    T, schedule = draw(st.integers(2, 300)), draw(st.sampled_from(BETA_SCHEDULES))
    options = {"timestep_spacing": draw(st.sampled_from(["trailing", "linspace", "kappa"]))}
    extra = {}
    if name == "multistep":
        options |= {"solver_order": draw(st.integers(1, 3)), "corrector": draw(st.booleans())}
        options["eta"] = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    if name == "ddim":
        extra["eta"] = draw(st.floats(0, 1))
    if name == "lcm":
        options["original_inference_steps"] = draw(st.integers(1, T))
    scheduler = make(name, num_train_timesteps=T, beta_schedule=schedule, **options)
    if draw(st.booleans()):
        own = draw(st.sets(st.integers(0, T - 1), min_size=1))
        scheduler.set_timesteps(timesteps=sorted(own, reverse=True))
        count = len(own)
    else:
        count = draw(st.integers(1, T))
        scheduler.set_timesteps(count)
    begin = draw(st.just(0) | st.integers(0, count - 1))
    return scheduler, count, begin, levels(T, beta_schedule=schedule), extra

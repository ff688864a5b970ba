"""Pipelines to calibrate, and a calibration as a config holds it, without a model that it was fitted to."""

import torch
from oracles import make
from published_models import shallow_unet
from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_unet

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRMultistepScheduler
from zsnr_diffusers.core.multistep import order_of_run


def default_weights(scheduler, n):
    """Timesteps and weights of the default sampler, in the form of a calibration."""
    scheduler.set_timesteps(n)
    updates = scheduler._updates_from(0, 0.0)
    sigmas = [*(float(level.sigma) for level in scheduler._path[1:]), 1.0]
    most = order_of_run(scheduler.config["solver_order"], n) + scheduler.config["corrector"]
    weights = [[gain / sigma for gain in update.gains] for update, sigma in zip(updates, sigmas, strict=True)]
    padded = [row + [0.0] * (min(i, most) - len(row)) for i, row in enumerate(weights, 1)]
    return {"timesteps": scheduler.timesteps.tolist(), "weights": padded}


def calibration(n=5, **config):
    """Weights that are not the default's, at timesteps that are not, for `make("multistep")`."""
    scheduler = make("multistep", **config)
    scheduler.set_timesteps(n)
    moved = [scheduler.timesteps[0].item(), *(t + 7 for t in scheduler.timesteps[1:].tolist())]
    weights = weights_at(scheduler, moved)
    for row in weights[1:]:
        row[0], row[1] = row[0] + 0.1 * sum(row), row[1] - 0.1 * sum(row)
    return {str(n): {"timesteps": moved, "weights": weights, "guidance_scale": 5.0, "guidance_rescale": 0.7}}


def weights_at(scheduler, timesteps):
    """Those of the default sampler at these timesteps."""
    scheduler.set_timesteps(timesteps=timesteps)
    scheduler._spaced_timesteps = lambda n: timesteps
    found = default_weights(scheduler, len(timesteps))["weights"]
    del scheduler._spaced_timesteps
    return found


def explicit_run(entry, alphas, sigmas, x, network):
    """The steps of a calibration, written out: y = x / sigma takes a weighted sum of the outputs x_0."""
    outputs, timesteps = [], entry["timesteps"]
    y = x / sigmas[timesteps[0]]
    for i, (t, row) in enumerate(zip(timesteps, entry["weights"], strict=True)):
        x = y * sigmas[t]
        outputs.insert(0, alphas[t] * x - sigmas[t] * network(x, t))
        keep = entry["keeps"][i] if "keeps" in entry else float(i + 1 < len(timesteps))
        y = keep * y + sum(w * x_0 for w, x_0 in zip(row, outputs, strict=False))
    return torch.as_tensor(y)


def pipeline(kind):
    """A pipeline on a zero-SNR schedule, and three conditions."""
    if kind == "classes":
        pipe, conditions = (
            ClassConditionalPipeline(tiny_unet(num_class_embeds=4), ZeroSNRMultistepScheduler()),
            [0, 2, 1],
        )
    else:
        pipe = tiny_stable_diffusion() if kind == "sd" else tiny_stable_diffusion_xl()
        pipe.unet = shallow_unet(pipe.unet.config)
        conditions = ["a dark landscape", "snow", "a black cat at night"]
    pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    return pipe, conditions

"""Faults that the config shows: of what it says of the model, and against what is loaded or running."""

from typing import Any

import torch

from ..core import noise_level
from .finding import Finding, clips, code, retrain, severity_for
from .subject import SchedulerUnderTest, rescaled_by_flag


def prediction_type(setup: SchedulerUnderTest) -> Finding | None:
    """Another prediction type than the network was trained for, where that is known from elsewhere."""
    known, said = setup.source.prediction_type, setup.config["prediction_type"]
    if known in (None, said):
        return None
    fix = {"prediction_type": known}
    what = f"the network predicts {known}, but is sampled as prediction_type={said!r}"
    return Finding("prediction-type", "error", what, code(setup, fix), fix)


def schedule_left_behind(setup: SchedulerUnderTest) -> Finding | None:
    """Weights without a scheduler beside them: stock takes another one than theirs, whatever the file says."""
    source = setup.source
    if not source.published or source.prediction_type == "epsilon":
        return None
    if source.prediction_type is None:
        return _schedule_not_said(setup)
    if source.lora:
        theirs, ours = "diffusers' load_lora_weights leaves that of the base", f"load_lora(pipe, {source.name!r})"
    else:
        theirs = "diffusers' from_single_file does not read what it predicts"
        ours = f"load_pipeline({source.name!r})"
    # A folder has room for a scheduler; a file that says what it is does all that it can.
    in_file = source.marked and source.path is None
    what = "the file says what it predicts, and " if in_file else "there is no scheduler beside the weights, and "
    told = (
        "" if source.marked else f" --prediction_type {source.prediction_type}" + " --zero_snr" * bool(source.zero_snr)
    )
    load = f"to load both:\nzsnr_diffusers.{ours}\n" if source.marked else ""
    return Finding(
        "schedule-left-behind",
        "note" if in_file else "error",
        what + theirs,
        f"{load}to have it beside the weights:\nzsnr convert {source.name} FOLDER{told}",
    )


def _schedule_not_said(setup: SchedulerUnderTest) -> Finding | None:
    """Of a LoRA it is to be known; a checkpoint that says nothing is taken for one of epsilon by all who read it."""
    if not setup.source.lora:
        return None
    what = "the file does not say what the network predicts with it, and is taken to be for its base's schedule"
    told = f"zsnr convert {setup.source.name} FOLDER --prediction_type v_prediction --zero_snr"
    return Finding("schedule-not-said", "note", what, f"if it is for another:\n{told}")


def epsilon_at_zero_snr(setup: SchedulerUnderTest) -> Finding | None:
    """Epsilon on a schedule that ends at zero SNR. No config tells which of the two is wrong; a caller may."""
    if not setup.zero_snr or setup.config["prediction_type"] != "epsilon":
        return None
    told = setup.source.prediction_type == "epsilon" and not setup.config.get("trained_betas")
    keep = {"rescale_betas_zero_snr": False}
    return Finding(
        "epsilon-at-zero-snr",
        "error",
        "prediction_type='epsilon' on a schedule that ends at zero SNR: there the sample is the noise, predicting it "
        "says nothing of the image, and stock gives NaN or noise",
        f"a model of v:\n{code(setup, {'prediction_type': 'v_prediction'})}\n"
        f"a model of epsilon, on its own schedule:\n{code(setup, keep)}\n"
        f"and to fix its brightness:\n{retrain(setup)}",
        keep if told else None,
    )


def terminal_snr(setup: SchedulerUnderTest) -> Finding | None:
    """A schedule that never reaches pure noise. Whether the network was trained on it no config tells."""
    if setup.zero_snr:
        return None
    alpha = f"sqrt(alpha_bar_T) = {float(noise_level(setup.trained, -1).alpha):.4g}"
    what = f"the schedule never reaches pure noise, so brightness is read off the noise: {alpha}"
    fix = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if (setup.source.prediction_type or setup.config["prediction_type"]) == "epsilon":
        return Finding("terminal-snr", "not zero-SNR", what, f"retrain it with v-prediction:\n{retrain(setup)}")
    if setup.source.zero_snr:
        what = f"the model was trained at zero terminal SNR, and is sampled at {alpha}"
        return Finding("terminal-snr", "error", what, code(setup, fix), fix)
    if setup.source.zero_snr is None:
        told = f"if it was trained at zero terminal SNR:\n{code(setup, fix)}\nif not:\n{retrain(setup)}"
        return Finding("terminal-snr", "not zero-SNR", what, told)
    return Finding("terminal-snr", "not zero-SNR", what, retrain(setup))


def flag_without_training(setup: SchedulerUnderTest) -> Finding | None:
    """Zero SNR switched on for a model that was not trained there, where that is known."""
    if setup.source.zero_snr is not False or not setup.config.get("rescale_betas_zero_snr"):
        return None
    fix = {"rescale_betas_zero_snr": False}
    what = "the model was not trained at zero terminal SNR, and is sampled there"
    return Finding("flag-without-training", "error", what, f"{code(setup, fix)}\nor:\n{retrain(setup)}", fix)


def rescaled_betas(setup: SchedulerUnderTest) -> Finding | None:
    """Zero SNR written as betas in place of the flag."""
    flag = setup.config.get("rescale_betas_zero_snr")
    if setup.config.get("trained_betas") is None or flag or not setup.zero_snr:
        return None
    fix: dict[str, Any] = {"rescale_betas_zero_snr": True}
    if rescaled_by_flag(setup.config, setup.trained):
        fix["trained_betas"] = None
    return Finding(
        "rescaled-betas",
        severity_for(setup.missing),
        "zero SNR is saved as trained_betas in place of the flag, so what looks at the flag does not know of it, and "
        "samplers in sigma divide by zero and return NaN",
        code(setup, fix),
        fix,
    )


def clip_in_latents(setup: SchedulerUnderTest) -> Finding | None:
    """x_0 cut to the range of pixels in a model of latents; stock's DDIM and DDPM do it unless told otherwise."""
    names, latent = clips(setup), setup.source.latent
    if not names or latent is False or (latent is None and setup.config["beta_schedule"] != "scaled_linear"):
        return None
    fix = dict.fromkeys(names, False)
    what = f"{' and '.join(names)} cut the predicted x_0 to the range of pixels, which latents exceed"
    if latent is None:
        return Finding("clip-in-latents", "note", f"if this is a model of latents: {what}", code(setup, fix))
    return Finding("clip-in-latents", "error", what, code(setup, fix), fix)


def no_guidance_rescale(setup: SchedulerUnderTest) -> Finding | None:
    """No phi recorded, where the paper has 0.7."""
    source = setup.source
    if not (setup.zero_snr and setup.config["prediction_type"] == "v_prediction" and source.guided):
        return None
    if source.guidance_rescale is not None:
        return None
    return Finding(
        "guidance-rescale-missing",
        "note",
        "no guidance rescale is recorded; at zero SNR a large guidance scale over-exposes",
        "to record it:\n"
        "zsnr_diffusers.enable_guidance_rescale(pipe, guidance_rescale=0.7); pipe.save_pretrained(folder)",
    )


def assigned(setup: SchedulerUnderTest) -> Finding | None:
    """What was assigned on `scheduler.config`: an attribute that the running scheduler reads and nobody saves."""
    assigned = setup.source.assigned
    if not assigned:
        return None
    names = ", ".join(f"{key}={value!r}" for key, value in assigned.items())
    what = f"{names} was assigned on scheduler.config: it does not change the schedule, and is not saved"
    return Finding("assigned-config", "error", what, code(setup, assigned), assigned)


def patched_schedule(setup: SchedulerUnderTest) -> Finding | None:
    """A schedule that was replaced on the object."""
    live = getattr(setup.source.live, "alphas_cumprod", None)
    made = getattr(setup.scheduler, "alphas_cumprod", None)
    if live is None or made is None or setup.source.assigned:
        return None
    live, made = live.detach().cpu().double(), made.double()
    if live.shape == made.shape and torch.allclose(live.sqrt(), made.sqrt(), rtol=0, atol=1e-3):
        return None
    flagged = rescaled_by_flag(setup.config, live)
    fix = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if flagged else None
    remedy = code(setup, fix) if fix else "set the betas in the config (trained_betas), and make the scheduler anew"
    what = "alphas_cumprod was replaced on the scheduler; its config says another schedule, which is what is saved"
    return Finding("patched-schedule", "error", what, remedy, fix)


def class_mismatch(setup: SchedulerUnderTest) -> Finding | None:
    """Two files that name two classes; the loader takes that of `model_index.json`."""
    said, loaded = setup.source.config.get("_class_name"), setup.config["_class_name"]
    if said in (None, loaded):
        return None
    what = f"the scheduler's config is of {said}, and model_index.json loads it as {loaded}"
    return Finding("class-mismatch", "note", what, "name the same class in both files", {"_class_name": loaded})

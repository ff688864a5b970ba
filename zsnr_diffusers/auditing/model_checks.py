"""Checks of the config: what it says about the model, and whether it matches what is loaded or running."""

from typing import Any

import torch

from ..core import noise_level
from .finding import (
    Finding,
    enabled_clipping,
    fit_start_command,
    from_config_line,
    retrain_command,
    severity_at_steps,
)
from .sources import Source
from .subject import SchedulerUnderTest, is_rescaled_to_zero_snr


def check_prediction_type_mismatch(setup: SchedulerUnderTest) -> Finding | None:
    """Report a config whose `prediction_type` is not the one that the network was trained for."""
    known, said = setup.source.prediction_type, setup.config["prediction_type"]
    if known in (None, said):
        return None
    fix = {"prediction_type": known}
    what = f"the network predicts {known}, but is sampled as prediction_type={said!r}"
    return Finding("prediction-type", "error", what, from_config_line(setup, fix), fix)


def check_schedule_left_behind(setup: SchedulerUnderTest) -> Finding | None:
    """Report weights without a scheduler config next to them, for which diffusers uses a different schedule."""
    source = setup.source
    if not source.published or source.prediction_type == "epsilon":
        return None
    if source.prediction_type is None:
        return _check_lora_schedule_unknown(setup)
    if source.lora:
        theirs, ours = "diffusers' load_lora_weights keeps the base's scheduler", f"load_lora(pipe, {source.name!r})"
    else:
        theirs = "diffusers' from_single_file does not read the prediction type"
        ours = f"load_pipeline({source.name!r})"
    # A folder can hold a scheduler; a file can only record its prediction type.
    in_file = source.marked and source.path is None
    what = "the file records its prediction type, but " if in_file else "there is no scheduler next to the weights: "
    load = f"to load both:\nzsnr_diffusers.{ours}\n" if source.marked else ""
    remedy = f"{load}to save the scheduler next to the weights:\n{_convert_command(source)}"
    return Finding("schedule-left-behind", "note" if in_file else "error", what + theirs, remedy)


def _convert_command(source: Source) -> str:
    """The `zsnr convert` command that saves the correct scheduler next to published weights."""
    options = f" --prediction_type {source.prediction_type}" + " --zero_snr" * bool(source.zero_snr)
    return f"zsnr convert {source.name} FOLDER" + ("" if source.marked else options)


def _check_lora_schedule_unknown(setup: SchedulerUnderTest) -> Finding | None:
    """Note a LoRA that does not record its prediction type; a checkpoint that does not is treated as epsilon."""
    if not setup.source.lora:
        return None
    what = "the file does not record a prediction type, so it is assumed to use its base's schedule"
    told = f"zsnr convert {setup.source.name} FOLDER --prediction_type v_prediction --zero_snr"
    return Finding("schedule-not-said", "note", what, f"if it uses a different schedule:\n{told}")


def check_epsilon_at_zero_snr(setup: SchedulerUnderTest) -> Finding | None:
    """Report `prediction_type="epsilon"` at zero terminal SNR; only the caller knows which of the two is wrong."""
    if not setup.zero_snr or setup.config["prediction_type"] != "epsilon":
        return None
    told = setup.source.prediction_type == "epsilon" and not setup.config.get("trained_betas")
    keep = {"rescale_betas_zero_snr": False}
    return Finding(
        "epsilon-at-zero-snr",
        "error",
        "prediction_type='epsilon' on a schedule that ends at zero SNR: there the sample is the noise, so predicting "
        "the noise gives no information about the image, and diffusers returns NaN or noise",
        f"a v-prediction model:\n{from_config_line(setup, {'prediction_type': 'v_prediction'})}\n"
        f"an epsilon model, with its own schedule:\n{from_config_line(setup, keep)}\n"
        f"and to fix its brightness:\n{retrain_command(setup)}",
        keep if told else None,
    )


def check_terminal_snr(setup: SchedulerUnderTest) -> Finding | None:
    """Report a schedule that never reaches pure noise; an error if the network was trained at zero SNR."""
    if setup.zero_snr:
        return None
    alpha = f"sqrt(alpha_bar_T) = {float(noise_level(setup.trained, -1).alpha):.4g}"
    what = f"the schedule never reaches pure noise, so signal leaks into the last timestep: {alpha}"
    fix = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if (setup.source.prediction_type or setup.config["prediction_type"]) == "epsilon":
        return _epsilon_without_zero_snr(setup, what)
    if setup.source.zero_snr:
        what = f"the model was trained at zero terminal SNR but is sampled at {alpha}"
        return Finding("terminal-snr", "error", what, from_config_line(setup, fix), fix)
    if setup.source.zero_snr is None:
        told = (
            f"if it was trained at zero terminal SNR:\n{from_config_line(setup, fix)}\n"
            f"if not:\n{retrain_command(setup)}"
        )
        return Finding("terminal-snr", "not zero-SNR", what, told)
    return Finding("terminal-snr", "not zero-SNR", what, retrain_command(setup))


def _epsilon_without_zero_snr(setup: SchedulerUnderTest, what: str) -> Finding:
    """The finding for an epsilon model, which can be retrained, or be used as it is with a start."""
    advice = f"retrain it with v-prediction:\n{retrain_command(setup)}"
    if setup.source.has_start:
        what += "; its start adds the signal that the network expects there"
    elif fit := fit_start_command(setup):
        advice += f"\nor use it as it is, with a start that adds the signal it expects:\n{fit}"
    return Finding("terminal-snr", "not zero-SNR", what, advice)


def check_flag_without_training(setup: SchedulerUnderTest) -> Finding | None:
    """Report `rescale_betas_zero_snr=True` for a model that was not trained at zero SNR."""
    if setup.source.zero_snr is not False or not setup.config.get("rescale_betas_zero_snr"):
        return None
    fix = {"rescale_betas_zero_snr": False}
    what = "the model was not trained at zero terminal SNR but is sampled there"
    return Finding(
        "flag-without-training", "error", what, f"{from_config_line(setup, fix)}\nor:\n{retrain_command(setup)}", fix
    )


def check_rescaled_betas(setup: SchedulerUnderTest) -> Finding | None:
    """Report zero SNR that is saved as `trained_betas` instead of `rescale_betas_zero_snr`."""
    flag = setup.config.get("rescale_betas_zero_snr")
    if setup.config.get("trained_betas") is None or flag or not setup.zero_snr:
        return None
    fix: dict[str, Any] = {"rescale_betas_zero_snr": True}
    if is_rescaled_to_zero_snr(setup.config, setup.trained):
        fix["trained_betas"] = None
    return Finding(
        "rescaled-betas",
        severity_at_steps(setup.point_errors),
        "zero SNR is saved as trained_betas instead of the flag, so code that checks the flag misses it, and "
        "sigma-based samplers divide by zero and return NaN",
        from_config_line(setup, fix),
        fix,
    )


def check_clip_in_latents(setup: SchedulerUnderTest) -> Finding | None:
    """Report `clip_sample` or `thresholding`, DDIM's and DDPM's default, on latents, which exceed [-1, 1]."""
    names, latent = enabled_clipping(setup), setup.source.latent
    if not names or latent is False or (latent is None and setup.config["beta_schedule"] != "scaled_linear"):
        return None
    fix = dict.fromkeys(names, False)
    what = f"{' and '.join(names)} clip the predicted x_0 to the range of pixels, which latents exceed"
    if latent is None:
        return Finding(
            "clip-in-latents", "note", f"if this is a latent diffusion model: {what}", from_config_line(setup, fix)
        )
    return Finding("clip-in-latents", "error", what, from_config_line(setup, fix), fix)


def check_guidance_rescale_missing(setup: SchedulerUnderTest) -> Finding | None:
    """Note a guided v-prediction model at zero SNR that records no guidance rescale; the paper uses 0.7."""
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


def check_assigned_config(setup: SchedulerUnderTest) -> Finding | None:
    """Report attributes assigned to `scheduler.config`, which the running scheduler reads but does not save."""
    assigned = setup.source.assigned
    if not assigned:
        return None
    names = ", ".join(f"{key}={value!r}" for key, value in assigned.items())
    what = f"{names} was assigned to scheduler.config: this does not change the schedule and is not saved"
    return Finding("assigned-config", "error", what, from_config_line(setup, assigned), assigned)


def check_patched_schedule(setup: SchedulerUnderTest) -> Finding | None:
    """Report an `alphas_cumprod` that was replaced on the scheduler and does not match its config."""
    live = getattr(setup.source.live, "alphas_cumprod", None)
    made = getattr(setup.scheduler, "alphas_cumprod", None)
    if live is None or made is None or setup.source.assigned:
        return None
    live, made = live.detach().cpu().double(), made.double()
    if live.shape == made.shape and torch.allclose(live.sqrt(), made.sqrt(), rtol=0, atol=1e-3):
        return None
    flagged = is_rescaled_to_zero_snr(setup.config, live)
    fix = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if flagged else None
    remedy = (
        from_config_line(setup, fix)
        if fix
        else "set the betas in the config (trained_betas) and create a new scheduler"
    )
    what = "alphas_cumprod was replaced on the scheduler; its config, which gets saved, describes another schedule"
    return Finding("patched-schedule", "error", what, remedy, fix)


def check_class_mismatch(setup: SchedulerUnderTest) -> Finding | None:
    """Note that `model_index.json`, which the loader uses, and the scheduler's config name different classes."""
    said, loaded = setup.source.config.get("_class_name"), setup.config["_class_name"]
    if said in (None, loaded):
        return None
    what = f"the scheduler's config is of {said}, and model_index.json loads it as {loaded}"
    return Finding("class-mismatch", "note", what, "name the same class in both files", {"_class_name": loaded})

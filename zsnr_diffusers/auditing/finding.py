"""An issue and its fix: lines of code, commands, or config changes."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..utils.tables import Note, Style
from ..utils.text import abbreviate
from .subject import REPORTED_STEPS, SchedulerUnderTest

Severity = Literal["error", "not zero-SNR", "wasteful", "note"]

_STYLES: dict[Severity, Style] = {"error": "bad", "not zero-SNR": "warning", "wasteful": "warning", "note": "quiet"}


@dataclass(frozen=True)
class Finding:
    """An issue that an audit found, or a note.

    Attributes:
        name: identifies the kind of issue.
        severity: `error`, the images are wrong; `not zero-SNR`, the model works as published but lacks one of the
            paper's fixes; `wasteful`, the images are correct but some steps have no effect; `note`, correct at the
            step counts that the report shows.
        what: what is wrong, with values.
        remedy: what to do, as a line of code or a command where possible. Alternatives are on separate lines, each
            after a line that names its case and ends with a colon.
        fix: changes to the scheduler's config that fix it, including `_class_name` if another class is needed; None if
            no config change fixes it.
        steps: affected step counts, if the issue depends on the step count.
    """

    name: str
    severity: Severity
    what: str
    remedy: str
    fix: Mapping[str, Any] | None = None
    steps: tuple[int, ...] = ()

    @property
    def remark(self) -> Note:
        """The finding as printed in an audit report."""
        return Note(self.severity, f"{self.name}: {self.what}", self.remedy, _STYLES[self.severity])


_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
LOG_SIGMA = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_OF_EULER = ("linear", "scaled_linear", "squaredcos_cap_v2")
_CLIPS = ("clip_sample", "thresholding")


def from_config_line(setup: SchedulerUnderTest, changes: Mapping[str, Any]) -> str:
    """Line of code that recreates the scheduler of a pipeline in memory with these config changes."""
    name = changes.get("_class_name", setup.scheduler_class.__name__)
    values = [f"{key}={value!r}" for key, value in changes.items() if key != "_class_name"]
    return f"pipe.scheduler = {name}.from_config({', '.join(['pipe.scheduler.config', *values])})"


def replacement_line(
    setup: SchedulerUnderTest, name: str = "ZeroSNRMultistepScheduler", *, trailing: bool = False
) -> str:
    """Line of code that replaces the scheduler with ours; `trailing` is for distilled flow models."""
    if setup.flow:
        kept = ", timestep_spacing='trailing', solver_order=1, corrector=False" if trailing else ""
        return f"pipe.scheduler = zsnr_diffusers.FlowMatchMultistepScheduler.from_config(pipe.scheduler.config{kept})"
    kept = "" if setup.zero_snr else ", rescale_betas_zero_snr=False"
    name = "ZeroSNRLCMScheduler" if _is_distilled(setup) else name
    return f"pipe.scheduler = zsnr_diffusers.{name}.from_config(pipe.scheduler.config{kept})"


def _is_distilled(setup: SchedulerUnderTest) -> bool:
    """Whether the audited config belongs to a distilled model, such as LCM."""
    return setup.config.get("original_inference_steps") is not None


def retrain_command(setup: SchedulerUnderTest) -> str:
    """Command line that fine-tunes the model to v-prediction at zero terminal SNR."""
    if setup.source.lora:
        return (
            "accelerate launch -m zsnr_diffusers.training --pretrained_model_name_or_path BASE --lora_rank 64 "
            "--train_data_dir IMAGES --output_dir RETRAINED"
        )
    module = "zsnr_diffusers.training.pixels" if setup.source.latent is False else "zsnr_diffusers.training"
    name = setup.source.name if setup.source.index and setup.source.live is None else "PIPELINE"
    return (
        f"accelerate launch -m {module} --pretrained_model_name_or_path {name} --train_data_dir IMAGES --output_dir "
        "RETRAINED"
    )


def fit_start_command(setup: SchedulerUnderTest) -> str | None:
    """Command line that fits a start to the unchanged model; None without text or without an autoencoder."""
    source = setup.source
    if source.lora or not source.latent or "text_encoder" not in source.index:
        return None
    name = source.name if source.live is None else "PIPELINE"
    return f"zsnr fit-start {name} --train_data_dir IMAGES --output start.safetensors"


def enabled_clipping(setup: SchedulerUnderTest) -> list[str]:
    """Which of `clip_sample` and `thresholding` are enabled in the scheduler's config."""
    accepted = [name for name in _CLIPS if name in setup.config and accepts_argument(setup, name)]
    return [name for name in accepted if setup.config[name]]


def accepts_argument(setup: SchedulerUnderTest, parameter: str) -> bool:
    """Whether the constructor of the scheduler's class has this parameter."""
    return parameter in inspect.signature(setup.scheduler_class.__init__).parameters


def _euler_config_changes(setup: SchedulerUnderTest) -> dict[str, Any] | None:
    """Config changes that make it an `EulerDiscreteScheduler`, which takes each next level from its own timesteps.

    None if Euler does not support the schedule or the clipping, or if the model is distilled.
    """
    config = setup.config
    known = config.get("trained_betas") is not None or config["beta_schedule"] in _OF_EULER
    if not known or _is_distilled(setup) or enabled_clipping(setup) or config.get("snr_shift_scale", 1) != 1:
        return None
    others = dict.fromkeys((key for key in LOG_SIGMA if config.get(key)), False)
    return {
        "_class_name": "EulerDiscreteScheduler",
        **{key: config[key] for key in _SCHEDULE if key in config},
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr")),
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # Euler reads neither of these, but DDIM does if a user switches to it
        "set_alpha_to_one": True,
        **others,
    }


def euler_advice_and_fix(setup: SchedulerUnderTest) -> tuple[str, dict[str, Any] | None]:
    """Advice and config changes for a finding that only another sampler fixes."""
    changes = _euler_config_changes(setup)
    if changes is None:
        return replacement_line(setup), None
    told = {key: changes[key] for key in ("_class_name", "rescale_betas_zero_snr", "timestep_spacing")}
    return from_config_line(setup, told), changes


def format_step_numbers(numbers: Iterable[int]) -> str:
    """The first six step counts and the number of remaining ones, for a finding's text."""
    return f"n = {abbreviate([*numbers], 6)}"


def severity_at_steps(numbers: Iterable[int]) -> Severity:
    """`error` if one of these step counts is in `REPORTED_STEPS`, else `note`."""
    return "error" if set(numbers) & set(REPORTED_STEPS) else "note"

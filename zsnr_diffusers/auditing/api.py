"""Audit a model, fix its scheduler's config where that is possible, and audit the result again."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..hub.files import HUB_KWARGS, INDEX, error_context
from ..schedulers.config import LARGEST_T
from ..utils.files import write_text
from .report import Audit, audit_source
from .sources import Source, read_source

ALL_STEPS = range(1, LARGEST_T + 1)
"""Every step count; `audit` ignores those above T."""


def audit(
    source: Any,
    *,
    deep: bool = False,
    prompts: Sequence[str] | Sequence[int] | None = None,
    device: Any = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    steps: Iterable[int] | None = None,
    **kwargs: Any,
) -> Audit:
    """Check whether a model is configured correctly for zero terminal SNR or flow matching, and how to fix it.

    Creates the scheduler as diffusers does and runs it on data whose correct result is known, for 1 to 20 steps and
    some larger step counts. For a flow-matching model, it also checks the flow times of 1 to 100 steps that its
    pipeline requests. No weights are loaded, and only the two config files of a Hub repo are downloaded.

    Args:
        source: a pipeline, a scheduler, a config with its `_class_name`, a folder, a Hub id, or a `.safetensors` file
            of a Stable Diffusion model. A LoRA's folder, repo or file is audited with the scheduler next to it, or
            else with the one its base was published with. A saved model can be passed as an opened `SavedModel`.
        deep: run the scheduler for every step count from 1 to T, which takes minutes, and load the weights, if there
            are any, for `evaluation.terminal_invariance`.
        prompts: for `deep`: texts or class labels. Eight images of each are generated to measure their brightness.
        device: for `deep`: device of the networks, if the pipeline is loaded here.
        prediction_type: what the network was trained to predict, if the config may be wrong about it.
        zero_snr: whether the network was trained at zero terminal SNR, which no config can show.
        steps: step counts to run the scheduler for, instead of those above.
        kwargs: for a Hub id: revision, token, cache_dir, local_files_only, force_download.

    Returns:
        The audit; `print` it.

    Raises:
        OSError: the source does not exist or has no scheduler.
        TypeError: an unsupported source, or an unknown argument.
        ValueError: the scheduler is neither variance-preserving nor flow-matching, or cannot be created; a Stable
            Diffusion 2.x file whose prediction type is unknown.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> from zsnr_diffusers import audit
        >>> stock = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> audit(stock).verdict
        'works as published; not zero-SNR'
    """
    unknown = sorted(set(kwargs) - set(HUB_KWARGS))
    if unknown:
        raise TypeError(f"audit takes no {', '.join(unknown)}; for a Hub id it takes {', '.join(HUB_KWARGS)}.")
    found = read_source(source, prediction_type, zero_snr, **kwargs)
    numbers = ALL_STEPS if deep and steps is None else steps
    with error_context(found.name):
        result = audit_source(found, None if numbers is None else tuple(numbers))
    if not deep:
        return result
    from .weights import audit_weights

    return audit_weights(result, prompts, device)


def fix(
    folder: str | Path,
    *,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    steps: Iterable[int] | None = None,
) -> Audit:
    """Fix the scheduler config of a pipeline, a LoRA or a scheduler in a local folder, using diffusers' classes.

    Nothing is written unless the fixed config passes without an error. The previous file is kept as
    `scheduler_config.json.bak`, and as `model_index.json.bak` if the class changes; an existing backup is not
    overwritten. Problems that need training are not hidden by setting a flag.

    Args:
        folder: of the pipeline or of the scheduler alone.
        prediction_type: as in `audit`; without it, an epsilon model at zero SNR is not changed.
        zero_snr: as in `audit`; without it, zero SNR is not enabled.
        steps: as in `audit`.

    Returns:
        The audit of the fixed folder.

    Raises:
        OSError: there is no scheduler, or its config cannot be written.
        ValueError: the source is not a local folder, or as in `audit`.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a local folder, and only local folders can be fixed. For a pipeline in memory: "
            "pipe.scheduler = zsnr_diffusers.audit(pipe).fixed_scheduler()"
        )
    before = audit(folder, prediction_type=prediction_type, zero_snr=zero_snr, steps=steps)
    after = before.fixed()
    if after is before or any(finding.severity == "error" for finding in after.findings):
        return before
    _write_fixed_configs(before.setup.source, after.setup.source, Path(folder))
    return audit(folder, prediction_type=prediction_type, zero_snr=zero_snr, steps=before.setup.numbers)


def _write_fixed_configs(old: Source, new: Source, folder: Path) -> None:
    """Write the changes of `fix`: the scheduler config, and `model_index.json` if the class changed."""
    if old.path is not None:  # as for every folder
        _replace_json(old.path, new.config)
    if new.index != old.index:
        _replace_json(folder / INDEX, new.index)


def _replace_json(path: Path, content: dict[str, Any]) -> None:
    """Overwrite a JSON file and keep the previous one as `.bak`, unless a backup exists."""
    path.parent.mkdir(exist_ok=True)  # a LoRA without a scheduler
    backup = path.with_name(path.name + ".bak")
    if path.exists() and not backup.exists():
        shutil.copyfile(path, backup)
    write_text(path, json.dumps(content, indent=2) + "\n")

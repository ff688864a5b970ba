"""Audit, and fix what changing a scheduler's config can fix. What is fixed is audited again."""

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
"""Every step count; those above T are left out."""


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

    The scheduler is made as stock makes it and run on numbers whose right result is known, for 1 to 20 steps and some
    more. Of a flow-matching model, the flow times of 1 to 100 steps are looked at, too, as its pipeline asks for them.
    Weights are not loaded, and of a Hub repo only its two config files are.

    Args:
        source: a pipeline, a scheduler, a config with its `_class_name`, a folder, a Hub id, or a `.safetensors`
            file of a Stable Diffusion; a LoRA's folder, repo or file is audited with the scheduler beside it, or with
            that which its base was published with. What is saved may be a `SavedModel` that was opened before.
        deep: run the scheduler for every step count from 1 to T, which takes minutes; and load the weights, if
            there are any, for `evaluation.terminal_invariance`.
        prompts: for `deep`: texts, or class labels. Eight images of each are made, for their brightness.
        device: for `deep`: where the networks of a pipeline that is loaded here run.
        prediction_type: what the network was trained to predict, if the config may be wrong about it.
        zero_snr: whether it was trained at zero terminal SNR, likewise: no config can tell.
        steps: step counts to run the scheduler for, in place of those above.
        kwargs: for a Hub id: revision, token, cache_dir, local_files_only, force_download.

    Returns:
        The audit; `print` it.

    Raises:
        OSError: there is nothing, or no scheduler in it.
        TypeError: a source of a different kind, or an unknown argument.
        ValueError: no scheduler of a variance-preserving or flow-matching model, or one that cannot be made; a file of
            a Stable Diffusion 2.x of which nothing says what it predicts.

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
    """Fix the scheduler's config of a pipeline, a LoRA or a scheduler in a local folder, with stock's classes.

    Nothing is written unless the fixed config passes without an error. The former file is kept beside it as
    `scheduler_config.json.bak`, and `model_index.json.bak` where the class changes; a backup that is there already is
    left alone. What needs training is not fixed by a flag.

    Args:
        folder: of the pipeline, or of the scheduler alone.
        prediction_type: as in `audit`; without it, an epsilon model at zero SNR is left alone.
        zero_snr: as in `audit`; without it, zero SNR is not switched on.
        steps: as in `audit`.

    Returns:
        The audit of the folder as it is then.

    Raises:
        OSError: there is no scheduler, or it cannot be written.
        ValueError: not a local folder, and as in `audit`.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no local folder, and only these are fixed; for a pipeline in memory: pipe.scheduler = "
            "zsnr_diffusers.audit(pipe).fixed_scheduler()"
        )
    before = audit(folder, prediction_type=prediction_type, zero_snr=zero_snr, steps=steps)
    after = before.fixed()
    if after is before or any(finding.severity == "error" for finding in after.findings):
        return before
    _write_fixed_configs(before.setup.source, after.setup.source, Path(folder))
    return audit(folder, prediction_type=prediction_type, zero_snr=zero_snr, steps=before.setup.numbers)


def _write_fixed_configs(old: Source, new: Source, folder: Path) -> None:
    """Write what `fix` changed after an audit: the scheduler's config, and `model_index.json` if its class is new."""
    if old.path is not None:  # as for every folder
        _replace_json(old.path, new.config)
    if new.index != old.index:
        _replace_json(folder / INDEX, new.index)


def _replace_json(path: Path, content: dict[str, Any]) -> None:
    """Overwrite a JSON file; the former one stays beside it as `.bak`, unless there is a backup already."""
    path.parent.mkdir(exist_ok=True)  # of a LoRA that has no scheduler yet
    backup = path.with_name(path.name + ".bak")
    if path.exists() and not backup.exists():
        shutil.copyfile(path, backup)
    write_text(path, json.dumps(content, indent=2) + "\n")

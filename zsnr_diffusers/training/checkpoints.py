"""Checkpoints that are either whole or not there, and the folder that a run owns."""

import json
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from .config import RunConfig

CONFIG_FILE = "training_config.yaml"
_PREFIX = "checkpoint-"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name[len(_PREFIX) :])


def check_output_dir(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, or None to start; refuses to mix two runs in one folder.

    Raises:
        ValueError: the folder holds a run and `--resume` was not passed, or it holds a run of other options.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir={folder} is a file.")
    written = folder / CONFIG_FILE
    holds_run = written.exists() or (folder / "model_index.json").exists() or bool(checkpoints(folder))
    if not holds_run:
        return None
    if not config.resume:
        raise ValueError(
            f"--output_dir={folder} already holds a run: pass --resume to go on with it, or another folder."
        )
    before = yaml.safe_load(written.read_text(encoding="utf-8")) if written.exists() else {}
    changed = [
        f"--{name} was {before[name]!r} and is now {getattr(config, name)!r}"
        for name in config.decides
        if name in before and before[name] != getattr(config, name)
    ]
    if changed:
        raise ValueError(f"Cannot resume {folder} as another run: {'; '.join(changed)}. Choose another --output_dir.")
    return next(reversed(checkpoints(folder)), None)


def save_checkpoint(accelerator: Accelerator, ema: EMAModel | None, config: RunConfig, step: int) -> Path:
    """Write a checkpoint under another name, rename it, then remove those beyond the limit."""
    folder = Path(config.output_dir)
    final, partial = folder / f"{_PREFIX}{step:06d}", folder / f".{_PREFIX}{step:06d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        if ema is not None:
            ema.save_pretrained(str(partial / "unet_ema"))
        (partial / "step.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[: -config.checkpoints_total_limit]:
            # Out of the way first: half of a checkpoint must never bear a checkpoint's name.
            doomed = old.rename(old.with_name(f".{old.name}.partial"))
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, ema: EMAModel | None, checkpoint: Path) -> int:
    """Restore weights, optimizer, scaler and moving average.

    Returns:
        The number of optimizer steps made.
    """
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        averaged = ema.model_cls.from_pretrained(checkpoint / "unet_ema")
        ema.shadow_params = [parameter.detach().to(accelerator.device) for parameter in averaged.parameters()]
        ema.optimization_step = averaged.config["optimization_step"]
    return step_of(checkpoint)

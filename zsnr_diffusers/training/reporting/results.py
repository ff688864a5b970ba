"""Results of a run at the end of its model card: images, brightness, loss, and options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .luminance import read_luminance_file
from .validation import first_and_last_preview
from .validation_loss import read_validation_loss

_LOCAL_PATHS = ("output_dir", "train_data_dir", "train_shards", "cache_dir", "validation_prompts_file")
_PROCESS_OPTIONS = ("resume", "force", "dry_run", "measure", "report_to", "push_to_hub", "hub_model_id")
_MAY_BE_FOLDERS = ("pretrained_model_name_or_path", "dataset_name")


def add_results_section(folder: Path, steps: int, losses: Sequence[float], options: Mapping[str, Any]) -> None:
    """Append a run's results to its model card: images, luminance, loss, options.

    Args:
        folder: of a run, with its model card.
        steps: of the run.
        losses: of its last steps.
        options: of the run, by name.
    """
    parts = [_image_links(folder), _luminance_table(folder, steps)]
    if losses:
        mean = sum(losses) / len(losses)
        parts.append(f"Training loss: {mean:.4g}, the mean of the last {len(losses)} steps.\n")
    parts.append(_validation_sentence(folder, steps))
    if mix := [Path(entry).name.rpartition("=") for entry in options["data_mix"]]:
        total = sum(float(weight) for _, _, weight in mix)
        shares = ", ".join(f"{float(weight) / total:.0%} {name}" for name, _, weight in mix)
        parts.append(f"Trained on samples of several datasets: {shares}.\n")
    parts.append(_options_section(options))
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n## Results\n\n" + "\n".join(part for part in parts if part))


def _image_links(folder: Path) -> str:
    """Markdown images of the first and the last preview."""
    paths = [path.relative_to(folder).as_posix() for path in first_and_last_preview(folder)]
    return "".join(f"![{Path(path).stem}]({path})\n" for path in paths)


def _luminance_table(folder: Path, last_step: int) -> str:
    """Markdown table of luminance before and after training; empty if not measured at the last step."""
    coverages = read_luminance_file(folder)
    if last_step not in coverages:
        return ""
    real = coverages[last_step].real
    names = {0: "before", last_step: f"after {last_step:,} steps"}
    rows = [
        f"| {name} | {one.generated.p5:.2f} to {one.generated.p95:.2f} | {one.w1:.3f}, floor {one.floor:.3f} |"
        for step, name in names.items()
        if (one := coverages.get(step))
    ]
    return f"""\
| mean luminance per image, -1 black to 1 white | 5th to 95th percentile | W1 to the data |
|---|---|---|
{chr(10).join(rows)}
| the data | {real.p5:.2f} to {real.p95:.2f} | |
"""


def _validation_sentence(folder: Path, last_step: int) -> str:
    """The validation loss before and after training, in words; empty if it was not measured."""
    found = read_validation_loss(folder)
    if last_step not in found:
        return ""
    before = f"{found[0]['mean']:.4g} before training, " if 0 in found else ""
    after = found[last_step]
    return (
        f"Loss on images that were kept aside: {before}{after['mean']:.4g} after it, {after['last']:.4g} at the last "
        "timestep.\n"
    )


def _options_section(options: Mapping[str, Any]) -> str:
    """Markdown of a run's options, without those that name local paths or only steer the process."""
    hidden = {*_LOCAL_PATHS, *_PROCESS_OPTIONS}
    hidden |= {name for name in _MAY_BE_FOLDERS if Path(options[name] or "").exists()}
    if mix := options["data_mix"]:
        options = {**options, "data_mix": [Path(entry).name for entry in mix]}
    shown = yaml.safe_dump({name: value for name, value in options.items() if name not in hidden}, sort_keys=False)
    return f"<details><summary>Options</summary>\n\n```yaml\n{shown}```\n\n</details>\n"

"""Output options of a run."""

from dataclasses import dataclass
from typing import Annotated

from .data import FolderConfig
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, option


@dataclass
class OutputConfig(FolderConfig):
    """Output options: checkpoints, previews, logs, the Hub."""

    checkpointing_steps: Annotated[int, POSITIVE] = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: Annotated[int, POSITIVE] = option(2, "Number of newest checkpoints to keep.")
    resume: bool = option(False, "Continue from the newest checkpoint in --output_dir, or start if there is none.")
    force: bool = option(False, "Resume even if data, base, seed or schedule have changed.")
    validation_steps: Annotated[int, POSITIVE] = option(500, "Steps between previews.")
    validation_rows: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Rows of the data, drawn by --seed, that are kept aside and never trained on; the loss on them is measured "
        "every --validation_loss_steps. Some 100 are enough. Of parquet files in --train_shards they are of "
        "--shuffle_shards row groups. Default: none.",
    )
    validation_loss_steps: Annotated[int, POSITIVE] = option(
        500,
        "Steps between measurements of the loss on --validation_rows, with the weights that are saved (the EMA, if "
        "there is one): without weights of timesteps, at the middle of each tenth of all timesteps "
        "(validation_loss/t050, ...; their mean is validation_loss) and at the last one (validation_loss/last), each "
        "time with the same noise, captions and crops. In the logs, in validation_loss.json and .png.",
    )
    luminance_images: Annotated[int, NOT_NEGATIVE] = option(
        32,
        "Number of images generated with each preview to measure luminance, without guidance, for a fixed set of "
        "captions or classes from the data. Comparing their mean luminance with the data's shows when the conversion "
        "is complete: a line on the terminal, luminance/p5, p95 and w1 in the logs, a histogram next to the preview, "
        "luminance.png over steps. Step 0 is the unchanged base. 0 for none.",
    )
    num_inference_steps: Annotated[int, POSITIVE] = option(30, "Sampling steps of the previews.")
    logging_steps: Annotated[int, POSITIVE] = option(
        50,
        "Steps between logs of the unweighted loss by timestep: in ten bins (loss/t000-099, ...) and at the last "
        "timestep (loss/last), each a mean since the previous log.",
    )
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (in output_dir/logs), wandb or another one of accelerate, which must be installed; all "
        "(installed ones); or none.",
    )
    push_to_hub: bool = option(
        False,
        "Upload the finished result to the Hub, without checkpoints, caches and logs. Token and repo are checked "
        "before the first step; if the upload fails, the result is kept and the command to repeat it is printed.",
    )
    hub_model_id: str | None = option(
        None, "Repo to push to, created if necessary: owner/name, or a name. Default: the name of --output_dir."
    )
    hub_private_repo: bool = option(False, "Create the repo as private; an existing repo is not changed.")
    measure: bool = option(
        False,
        "With --dry_run: also time some steps, on noise if no data is given, and estimate the total time.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure and not self.dry_run:
            raise ValueError("--measure trains nothing: pass --dry_run with it.")

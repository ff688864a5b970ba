"""What a run writes."""

from dataclasses import dataclass
from typing import Annotated

from .data import FolderConfig
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, option


@dataclass
class OutputConfig(FolderConfig):
    """What a run writes, and when: checkpoints, images on the way, logs, the Hub."""

    checkpointing_steps: Annotated[int, POSITIVE] = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: Annotated[int, POSITIVE] = option(2, "Checkpoints kept, the newest.")
    resume: bool = option(False, "Continue from the newest checkpoint in --output_dir, or start if there is none.")
    force: bool = option(False, "Resume although data, base, seed or schedule are not those that the run began with.")
    validation_steps: Annotated[int, POSITIVE] = option(500, "Steps between previews.")
    validation_rows: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Rows of the data, drawn by --seed, that are kept aside and never trained on; the loss on them is measured "
        "every --validation_loss_steps. Some 100 are enough. Of parquet files in --train_shards they are of "
        "--shuffle_shards row groups. Default: none.",
    )
    validation_loss_steps: Annotated[int, POSITIVE] = option(
        500,
        "Steps between measurements of the loss on --validation_rows, with the weights that are saved (the moving "
        "average, if there is one): without weights of timesteps, at the middle of each tenth of all timesteps "
        "(validation_loss/t050, ...; their mean is validation_loss) and at the last one (validation_loss/last), each "
        "time with the same noise, captions and crops. In the logs, in validation_loss.json and .png.",
    )
    luminance_images: Annotated[int, NOT_NEGATIVE] = option(
        32,
        "Images that are generated with each preview, without guidance, for captions or classes drawn from the data, "
        "the same each time. Their mean luminance beside the data's shows when the conversion is done: a line on the "
        "terminal, luminance/p5, p95 and w1 in the logs, a histogram beside the preview, luminance.png over steps. "
        "Step 0 is the base as it came. 0 for none.",
    )
    num_inference_steps: Annotated[int, POSITIVE] = option(30, "Sampling steps of the previews.")
    logging_steps: Annotated[int, POSITIVE] = option(
        50,
        "Steps between logs of the loss by timestep, without weights: in ten bins (loss/t000-099, ...) and at the "
        "last timestep alone (loss/last), each a mean since the log before.",
    )
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (in output_dir/logs), wandb or another of accelerate's, which has to be installed; all "
        "that are; or none.",
    )
    push_to_hub: bool = option(
        False,
        "Upload the result to the Hub when it is whole on the disk, without checkpoints, caches and logs. Token and "
        "repo are checked before the first step; if the upload fails, the result stays and the command to repeat it "
        "is printed.",
    )
    hub_model_id: str | None = option(
        None, "Repo to push to, made if need be: owner/name, or a name. Default: that of --output_dir."
    )
    hub_private_repo: bool = option(False, "Make that repo a private one; one that exists stays as it is.")
    measure: bool = option(
        False,
        "With --dry_run: also time some steps, on noise if no data is named, and project the time of all.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure and not self.dry_run:
            raise ValueError("--measure trains nothing: pass --dry_run with it.")

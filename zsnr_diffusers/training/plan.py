"""The plan of a run, printed before its first step."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..schedulers.config import is_flow
from ..utils.tables import KeyValues, Part, Report
from .config import ComputeConfig, NetworkConfig, OptimizationConfig, OutputConfig
from .data.loader import TrainingDataset
from .memory import MemoryEstimate
from .output import Output


@dataclass(frozen=True)
class Plan(Report):
    """The plan of a run, by name."""

    lines: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in self.lines.items())

    def parts(self) -> Iterator[Part]:
        """The plan as one table for a terminal."""
        yield KeyValues(("training", ""), tuple(self.lines.items()))


def describe_samples(config: OutputConfig, samples: TrainingDataset, count: int) -> dict[str, str]:
    """What is drawn from each source of a mix, and what is kept aside for the validation loss; empty for neither.

    Args:
        config: output options.
        samples: of the run.
        count: of them that it will show.
    """
    held_out = len(samples.held_out)
    line = f"loss on {held_out:,} images that are kept aside, every {config.validation_loss_steps:,} steps"
    return samples.describe_mix(count) | ({"validation": line} if held_out else {})


def describe_memory(estimate: MemoryEstimate) -> dict[str, str]:
    """What a step takes of each device's memory."""
    return {"memory": f"{estimate}; libraries need another 1 to 3 GB of a GPU"}


def describe_steps(
    config: NetworkConfig, epoch_length: int, processes: int, checkpoint: Path | None
) -> dict[str, str]:
    """How many steps are made of which batches, over which processes.

    Args:
        config: how the network is computed, and its batch.
        epoch_length: samples of an epoch.
        processes: that share the work.
        checkpoint: to continue from.
    """
    batch = config.global_batch(processes)
    epochs = config.max_train_steps * batch / epoch_length
    return {
        **_describe_sharding(config, processes),
        "global batch": f"{batch} = {config.train_batch_size} x {config.gradient_accumulation_steps} forward "
        f"passes x {processes} processes",
        "steps": f"{config.max_train_steps:,} = {epochs:,.1f} epochs"
        + (f", continuing from {checkpoint.name}" if checkpoint else ""),
        **_warmup_warning(config),
    }


def describe_result(output: Output, folder: str) -> dict[str, str]:
    """The scheduler that is saved, and where."""
    scheduler = output.export_scheduler()
    kind = f", {scheduler.config.timestep_spacing} spacing"
    if is_flow(scheduler.config):
        kind = f" over flow times, shift {scheduler.config.flow_shift:g}"
    return {"saved scheduler": f"{type(scheduler).__name__}{kind}, in {folder}"}


def _warmup_warning(config: OptimizationConfig) -> dict[str, str]:
    """A warning if the run ends before its learning-rate warm-up; else empty."""
    warmup, steps = config.lr_warmup_steps or 0, config.max_train_steps
    if warmup < steps or config.lr_scheduler == "constant":
        return {}
    return {
        "warning": f"--lr_warmup_steps={warmup} is as long as the run or longer: the learning rate ends at "
        f"{steps / warmup:.0%} of {config.learning_rate:g}; lower it to about {steps // 10}"
    }


def _describe_sharding(config: ComputeConfig, processes: int) -> dict[str, str]:
    """How the network is divided over processes; empty if it is not."""
    if not (share := config.shards_over(processes)):
        return {}
    copies = f", {config.dp_replicate_size} copies" if config.dp_replicate_size > 1 else ""
    on_host = ", kept in the host's memory" if config.fsdp_offload_params else ""
    return {"sharding": f"{config.sharding} over {share} processes{copies}{on_host} (FSDP2)"}

"""A run from its first step to its last: logs, previews, checkpoints, the result."""

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..utils.images import ImageError
from .config import OutputConfig
from .data.remote import ShardError
from .errors import TrainingError, TrainingInterrupted
from .output import Output
from .reporting.results import add_results_section
from .reporting.upload import upload_run
from .reporting.validation import ValidationLogger
from .reporting.validation_loss import ValidationLoss
from .trainer import Trainer


class TrainingLoop:
    """The training loop, with its outputs.

    Args:
        config: output options.
        trainer: executes the steps.
        output: writes the result.
        validation: the previews.
        options: of the whole run, by name, for trackers and the model card.
        repo: to push the result to; None for none.
        on_step: called with the number of steps made, instead of a progress bar.
    """

    def __init__(
        self,
        config: OutputConfig,
        trainer: Trainer,
        output: Output,
        validation: ValidationLogger,
        options: Mapping[str, Any],
        repo: str | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.trainer, self.output, self.validation = config, trainer, output, validation
        self.options, self.repo, self.on_step = options, repo, on_step
        self.accelerator, self.processes = trainer.accelerator, trainer.processes
        self.last_step = trainer.config.max_train_steps
        self.validation_loss = ValidationLoss(config, trainer) if trainer.samples.samples.held_out else None
        self._shown: dict[str, str] = {}

    def run(self) -> None:
        """Train to the last step, then write the result.

        Raises:
            TrainingError: a worker died or read a bad image, and as in `Trainer.train_step`.
            TrainingInterrupted: a signal arrived; the step was finished and a checkpoint written.
        """
        try:
            self._run_steps()
        except Exception as error:
            self.trainer.saver.settle()
            for tracker in self.accelerator.trackers:
                tracker.finish()  # it writes every few minutes, and the last ones are of interest now
            if reason := self._worker_error_reason(error):
                step, kept = self.trainer.step + 1, self.trainer.saver.describe_last()
                raise TrainingError(f"At step {step}: {reason}; {kept}. Then --resume.") from error
            raise

    def _worker_error_reason(self, error: Exception) -> str:
        """Why a DataLoader worker failed or died, in words; empty for any other error."""
        if isinstance(error, ImageError | ShardError):
            # It comes with its traceback, which ends in its message.
            return str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        # torch raises a RuntimeError wherever this process is when it hears of the death.
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return str(error)
        # While a batch is on its way, it is the connection that breaks first.
        if self.trainer.task.data.num_workers > 0 and isinstance(error, ConnectionError | EOFError):
            return f"a DataLoader worker died while sending a batch ({str(error) or type(error).__name__})"
        return ""

    def _run_steps(self) -> None:
        """`run` without the translation of workers' errors."""
        trainer, accelerator, output_dir = self.trainer, self.accelerator, self.config.output_dir
        if self.config.report_to != "none":
            scalars = {k: v for k, v in self.options.items() if isinstance(v, int | float | str)}
            accelerator.init_trackers("logs", scalars)
        hidden = self.on_step is not None or not accelerator.is_main_process
        progress = tqdm(desc="training", total=self.last_step, initial=trainer.step, disable=hidden)
        with trainer.signals, progress, trainer.batches(self.last_step) as batches:
            self._report_step()
            self._validate()  # at step 0, or where a signal came first
            while trainer.step < self.last_step:
                started = time.perf_counter()
                loss = trainer.train_step(batches)
                self._log_step(progress, loss, time.perf_counter() - started)
                self._report_step()
                self._after_step()
            with self.processes.sync_errors(), trainer.export_unet() as unet:
                if self.processes.is_main:
                    self.output.save(unet)
                    add_results_section(Path(output_dir), self.last_step, trainer.losses, self.options)
        accelerator.print(f"Saved the result in {output_dir}")
        if (repo := self.repo) is not None:
            url = self.processes.run_on_main(lambda: upload_run(self.config, repo, self.last_step))
            accelerator.print(f"Pushed it to {url}")
        self._finish()

    def _report_step(self) -> None:
        """Call `on_step`, if there is one."""
        if self.on_step is not None:
            self.on_step(self.trainer.step)

    def _log_step(self, progress: Any, loss: float, seconds: float) -> None:
        """Send a step's loss, learning rate and speed to the progress bar and trackers."""
        step, config = self.trainer.step, self.trainer.config
        if step % self.config.logging_steps == 0:
            self.accelerator.log(self.trainer.loss_by_timestep.means(self.accelerator), step=step)
        speed = config.global_batch(self.accelerator.num_processes) / seconds
        self._shown |= {"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"}
        progress.set_postfix(self._shown, refresh=False)
        progress.update()
        lr = self.trainer.optimization.learning_rate
        self.accelerator.log({"loss": loss, "learning_rate": lr, "images_per_second": speed}, step=step)

    def _after_step(self) -> None:
        """Save a checkpoint and validate if this step is due; stop if a signal came."""
        config, trainer, last = self.config, self.trainer, self.trainer.step == self.last_step
        if last or trainer.stop or trainer.step % config.checkpointing_steps == 0:
            trainer.save_checkpoint(Path(config.output_dir), config.checkpoints_total_limit)
        if last or trainer.stop:
            trainer.saver.wait()  # before anything is written that says that the run is over
        if trainer.stop and not last:
            kept = trainer.saver.describe_last()
            self.accelerator.print(f"Stopped after step {trainer.step}; {kept}. --resume continues from there.")
            self._finish()
            # In a process that heard nothing itself, the others did.
            raise TrainingInterrupted(trainer.signals.received or signal.SIGTERM)
        self._validate()

    def _validate(self) -> None:
        """Measure the validation loss and save validation images of the exported weights, if this step is due."""
        step = self.trainer.step
        last, config = step == self.last_step, self.config
        if self.validation_loss is not None and (last or step % config.validation_loss_steps == 0):
            self._shown["validation"] = f"{self.validation_loss.save(step):.4f}"
        if last or step % config.validation_steps == 0:
            self._save_previews()

    def _save_previews(self) -> None:
        """Save validation images of the exported weights, in the main process."""
        with self.processes.sync_errors(), self.trainer.export_unet() as unet:
            if self.processes.is_main:
                self.validation.save(unet, self.trainer.step)

    def _finish(self) -> None:
        """Close trackers once all processes have come here."""
        self.processes.drain()
        self.accelerator.end_training()

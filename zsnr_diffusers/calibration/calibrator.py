"""Fit a few-step sampler to a model, using its own many-step samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from ..core.choices import check_guidance_rescale, check_keep_low_frequencies
from ..core.multistep import order_of_run
from ..evaluation import generate_images, sample_grid
from ..schedulers import ZeroSNRMultistepScheduler
from .network import Guidance, GuidedNetwork, call_kwargs_for_batch, record_guided_network
from .refinement import fit_steps, max_network_calls
from .report import ERRORS, CalibratedNumber, Calibration
from .student import Student
from .trajectory import Trajectory, default_scheduler, run_teacher, sample_in_steps, start_grids, teacher_timesteps

FEWEST_PROMPTS = 8
HELD_OUT = 4
"""One of this many prompts is held out."""
STEPS = (4, 5, 6, 8)
TEACHER_STEPS = 100
NUM_PROMPTS = 64


class Calibrator:
    """Fits timesteps and weights of `ZeroSNRMultistepScheduler` to a pipeline, one step count after another.

    The constructor records the network's inputs and checks everything that can be checked before hours of work;
    `numbers` does the work, and `calibrate` combines both.

    Args:
        pipe: text-to-image or class-conditional, with a UNet: Stable Diffusion, SDXL, `ClassConditionalPipeline`.
        prompts: at least 8 typical ones; the last of every four is held out. Class labels for a class-conditional
            pipeline, None for an unconditional one.
        steps: step counts, each at least 2.
        guidance_scale: w in u + w (c - u); the calibration is valid for this value.
        guidance_rescale: phi of Lin et al. 2023, Algorithm 2; by default the pipeline's own.
        keep_low_frequencies: k of `enable_guidance_rescale`; by default the pipeline's own.
        num_prompts: number of images, each with its own seed; prompts are repeated or dropped to match.
        seed: of the first image.
        teacher_steps: of the teacher.
        batch_size: images per call of the network.
        call_kwargs: for the pipeline's call, such as `negative_prompt`, `height` and `width`.

    Attributes:
        network_calls: upper bound of the number of network calls, in batches.
        on_call: called after each call.

    Raises:
        ValueError: fewer than 8 prompts or images; a pipeline that uses other guidance, passes ControlNet residuals or
            extra channels to its UNet, or has no variance-preserving schedule; steps out of range.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any] | None,
        *,
        steps: Sequence[int] = STEPS,
        guidance_scale: float,
        guidance_rescale: float | None = None,
        keep_low_frequencies: int | None = None,
        num_prompts: int = NUM_PROMPTS,
        seed: int = 0,
        teacher_steps: int = TEACHER_STEPS,
        batch_size: int = 4,
        **call_kwargs: Any,
    ) -> None:
        self.guidance = _resolve_guidance(pipe, guidance_scale, guidance_rescale, keep_low_frequencies)
        self.fitted, self.held_out = split_prompts(prompts, num_prompts, seed)
        self.steps, self.teacher_steps = sorted(set(steps)), teacher_steps
        self._pipe, self._call_kwargs = pipe, call_kwargs
        self.scheduler = default_scheduler(pipe.scheduler)
        self._timesteps = teacher_timesteps(self.scheduler, teacher_steps, self.steps)
        self.on_call: Callable[[], Any] = lambda: None
        self._networks = [
            record_guided_network(
                pipe, conditions, seeds, **self.guidance._asdict(), batch_size=batch_size, **call_kwargs
            )
            for conditions, seeds in (self.fitted, self.held_out)
        ]

    @property
    def network_calls(self) -> int:
        """Upper bound of the number of network calls, one batch each: teacher, comparisons, and search."""
        fitted, held_out = (network.num_batches for network in self._networks)
        order, corrector = self.scheduler.config["solver_order"], self.scheduler.config["corrector"]
        calls = sum(max_network_calls(n, order_of_run(order, n) + corrector) for n in self.steps)
        compared = len(self._timesteps) + sum(2 * n for n in self.steps)
        return compared * (fitted + held_out) + calls * fitted

    def seconds_per_call(self) -> float:
        """How long one network call takes, a batch of fitted images: the second of two, since the first warms up."""
        return self._networks[0].time_calls(2)[-1]

    def numbers(self) -> Iterator[CalibratedNumber]:
        """Calibrate each step count in increasing order; yields each when it is finished."""
        for network in self._networks:
            network.on_call = lambda: self.on_call()
        runs = [(network, run_teacher(network, self.scheduler, self._timesteps)) for network in self._networks]
        student = Student(runs[0][0], self.scheduler, runs[0][1])
        for n in self.steps:
            timesteps, weights, keeps = fit_steps(student, start_grids(self.scheduler, n)).steps
            rows = [row.tolist() for row in weights]
            entry = {"timesteps": timesteps, "weights": rows, "keeps": keeps, "kappas": student.kappas(timesteps)}
            yield CalibratedNumber(n, entry, **self._sampler_errors(n, entry, runs))

    def _sampler_errors(
        self, n: int, entry: Mapping[str, Any], runs: Sequence[tuple[GuidedNetwork, Trajectory]]
    ) -> dict[str, Any]:
        """Distance to the teacher of the default and the calibrated sampler, on fitted prompts and held-out ones."""
        calibrated = self.calibrated({str(n): entry})
        errors = [
            teacher.error(sample_in_steps(network, scheduler, n))
            for network, teacher in runs
            for scheduler in (self.scheduler, calibrated)
        ]
        return dict(zip(ERRORS, errors, strict=True))

    def calibrated(self, calibration: Mapping[str, Any]) -> ZeroSNRMultistepScheduler:
        """The default multistep sampler with a `calibration` in its config."""
        scheduler: ZeroSNRMultistepScheduler = ZeroSNRMultistepScheduler.from_config(
            self.scheduler.config, calibration=calibration
        )
        return scheduler

    def picture(self, numbers: Sequence[CalibratedNumber], rows: int = 3, cell: int = 256) -> Image.Image:
        """Draw a grid of held-out images: default and calibrated sampler at each step count, and the teacher.

        Args:
            numbers: the calibrated step counts.
            rows: maximum number of prompts.
            cell: largest side of an image, in pixels.
        """
        runs = [
            (f"{name}, {one.num_inference_steps}", scheduler, one.num_inference_steps)
            for one in numbers
            for name, scheduler in (("default", self.scheduler), ("calibrated", self.calibrated(one.config())))
        ]
        runs.append((f"{self.teacher_steps} steps", self.scheduler, self.teacher_steps))
        columns = [self._generate_held_out(scheduler, n, rows) for _, scheduler, n in runs]
        conditions, seeds = self.held_out
        labels = [f"seed {seed}" for seed in seeds] if conditions is None else [*map(str, conditions)]
        side = min(cell, max(columns[0][0].size))
        names = [name for name, _, _ in runs]
        return sample_grid([*zip(*columns, strict=True)], labels[:rows], cell=max(side, 96), column_labels=names)

    def _generate_held_out(self, scheduler: Any, num_inference_steps: int, rows: int) -> list[Image.Image]:
        """Images of at most `rows` held-out prompts by another scheduler."""
        conditions, seeds = self.held_out
        call = self.guidance.call_kwargs(self._pipe) | self._call_kwargs
        former, self._pipe.scheduler = self._pipe.scheduler, scheduler
        try:
            return generate_images(
                self._pipe,
                conditions and conditions[:rows],
                seeds[:rows],
                num_inference_steps=num_inference_steps,
                batch_size=1,
                progress=False,
                **call_kwargs_for_batch(call, 1),
            )
        finally:
            self._pipe.scheduler = former

    def report(self, numbers: Sequence[CalibratedNumber]) -> Calibration:
        """The report on these step counts and their settings."""
        images = len(self._networks[0]), len(self._networks[1])
        scale, rescale, k = self.guidance
        return Calibration(tuple(numbers), scale, rescale, self.teacher_steps, images, k)


def calibrate(
    pipe: Any, prompts: Sequence[str] | Sequence[int] | None, *, guidance_scale: float, **options: Any
) -> tuple[ZeroSNRMultistepScheduler, Calibration]:
    """Fit the sampler to a model, for the step counts and the guidance it will be used with.

    ```python
    pipe.scheduler, report = calibrate(pipe, prompts, steps=(4, 6), guidance_scale=5.0)
    ```

    The teacher is the default sampler in many steps. For each step count, the weights of each step are fitted by least
    squares to the teacher's samples, on the path that the few steps themselves take; then all weights and timesteps
    are moved together towards the teacher's clean samples. Nothing is differentiated, so the network needs no more
    memory than for sampling. The teacher's samples are kept in CPU memory (0.9 GB for 64 SDXL images at 100 steps in
    half precision), as is a change of the clean samples for each weight and timestep. Related methods that use
    backpropagation: LD3 (arXiv:2405.15506), S4S (arXiv:2502.17423), GAS (arXiv:2510.17699).

    Args:
        pipe: as in `Calibrator`.
        prompts: likewise.
        guidance_scale: likewise.
        options: the other arguments of `Calibrator`.

    Returns:
        The scheduler, with the step counts that are closer to the teacher on held-out prompts, and the report.

    Raises:
        ValueError: as in `Calibrator`.
    """
    calibrator = Calibrator(pipe, prompts, guidance_scale=guidance_scale, **options)
    report = calibrator.report([*calibrator.numbers()])
    return calibrator.calibrated(report.config()), report


def _resolve_guidance(
    pipe: Any, guidance_scale: float, guidance_rescale: float | None, keep_low_frequencies: int | None
) -> Guidance:
    """The guidance to calibrate for: the given one, or else the pipeline's; other settings are 0 without guidance."""
    phi = getattr(pipe, "default_guidance_rescale", 0.0) if guidance_rescale is None else guidance_rescale
    k = getattr(pipe, "default_keep_low_frequencies", 0) if keep_low_frequencies is None else keep_low_frequencies
    check_guidance_rescale(phi)
    check_keep_low_frequencies(k)
    return Guidance(guidance_scale, phi, k) if guidance_scale > 1 else Guidance(guidance_scale)


Share = tuple[list[Any] | None, list[int]]
"""Conditions and seeds."""


def split_prompts(prompts: Sequence[Any] | None, num_prompts: int, seed: int) -> tuple[Share, Share]:
    """Prompts and seeds for fitting and for holding out; they share no seed, and no prompt unless it was repeated.

    Raises:
        ValueError: fewer than 8.
    """
    for name, number in (("prompts", num_prompts if prompts is None else len(prompts)), ("num_prompts", num_prompts)):
        if number < FEWEST_PROMPTS:
            raise ValueError(f"{number} {name} are too few to fit and hold out: pass at least {FEWEST_PROMPTS}.")
    count = num_prompts if prompts is None else min(len(prompts), num_prompts)
    shares: list[tuple[list[Any], list[int]]] = [([], []), ([], [])]
    for i in range(num_prompts):
        conditions, seeds = shares[i % count % HELD_OUT == HELD_OUT - 1]
        conditions.append(None if prompts is None else prompts[i % count])
        seeds.append(seed + i)
    fitted, held_out = ((None if prompts is None else conditions, seeds) for conditions, seeds in shares)
    return fitted, held_out

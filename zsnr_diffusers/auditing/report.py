"""The result of an audit and its report."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..core import alpha_bar_table, noise_level, snr
from ..core.flow import trailing_times
from ..utils.tables import KeyValues, Part, Remarks, Report, Style, Table, Text, one_line
from .checks import run_checks
from .finding import Finding
from .flow_subject import FlowSchedulerUnderTest, build_flow_scheduler_under_test, is_flow_source
from .sources import Source
from .subject import REPORTED_STEPS, SchedulerUnderTest, build_scheduler_under_test, drop_unaccepted_keys

if TYPE_CHECKING:
    from ..evaluation import LuminanceSummary, TerminalInvariance

PAPER = {
    "linear": ("linear", 0.0001, 0.02),
    "cosine": ("squaredcos_cap_v2", 0.0, 0.0),
    "Stable Diffusion": ("scaled_linear", 0.00085, 0.012),
}
"""The schedules of Lin et al. 2023, table 1, with T = 1000: name in diffusers, and first and last beta."""


RIGHT, AS_PUBLISHED, WRONG = "OK", "works as published; not zero-SNR", "misconfigured"
WASTEFUL = "works as published; wastes steps"
_TONES: dict[str, Style] = {RIGHT: "good", AS_PUBLISHED: "warning", WASTEFUL: "warning", WRONG: "bad"}


_MAX_PASSES = 4
"""A fix may reveal another issue, such as DDIM's step sizes once its spacing is correct."""


@cache
def paper_terminal_snrs() -> dict[str, tuple[float, float]]:
    """SNR(T) and sqrt(alpha_bar_T) of the three schedules in Lin et al. 2023, table 1, by name."""
    rows = {}
    for name, (schedule, start, end) in PAPER.items():
        level = noise_level(alpha_bar_table(schedule, 1000, start, end), -1)
        rows[name] = (float(snr(level)), float(level.alpha))
    return rows


@dataclass(frozen=True)
class Audit(Report):
    """How a model is configured, and what is wrong with the configuration.

    Attributes:
        source: name of what was audited.
        scheduler: class of the loaded scheduler.
        pipeline: class of the pipeline; None for a scheduler alone.
        prediction_type: what the network is assumed to predict.
        terminal_snr: SNR(T) of the sampled schedule.
        terminal_alpha: sqrt(alpha_bar_T), likewise.
        num_train_timesteps: T.
        rescale_betas_zero_snr: the flag, as configured.
        timestep_spacing: as configured; None if the scheduler has none.
        first_timesteps: pairs of a step count and its first timestep, which should be T - 1.
        final_alpha: sqrt(alpha_bar) where sampling ends, which should be 1; None if unknown.
        trained_betas: whether the betas themselves are saved.
        guidance_rescale: guidance_rescale as recorded, or None.
        keep_low_frequencies: keep_low_frequencies as recorded, or 0.
        steps_tried: step counts that the scheduler was run for.
        findings: issues and notes, errors first.
        config: the scheduler's config as it is saved.
        setup: the scheduler under test.
        invariance: terminal invariance of the network, if the weights were loaded.
        luminance: brightness of images, if prompts were given too.
    """

    source: str
    scheduler: str
    pipeline: str | None
    prediction_type: str
    terminal_snr: float
    terminal_alpha: float
    num_train_timesteps: int
    rescale_betas_zero_snr: bool
    timestep_spacing: str | None
    first_timesteps: tuple[tuple[int, float], ...]
    final_alpha: float | None
    trained_betas: bool
    guidance_rescale: float | None
    keep_low_frequencies: int
    steps_tried: tuple[int, ...]
    findings: tuple[Finding, ...]
    config: dict[str, Any]
    setup: SchedulerUnderTest = field(repr=False, compare=False)
    invariance: "TerminalInvariance | None" = None
    luminance: "LuminanceSummary | None" = None

    def __repr__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{severity}: {number}" for severity, number in counts.items())
        return f"{type(self).__name__} of {self.source}: {self.verdict}" + (f" ({found})" if found else "")

    @property
    def ok(self) -> bool:
        """Whether the audit found only notes."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """`OK`, `misconfigured`, or how it works as published.

        The latter is `works as published; not zero-SNR` (Stable Diffusion 1.x and 2.x), or for flow-matching models
        `works as published; wastes steps` (Stable Diffusion 3).
        """
        severities = {finding.severity for finding in self.findings}
        by_severity = {"error": WRONG, "not zero-SNR": AS_PUBLISHED, "wasteful": WASTEFUL}
        return next((verdict for severity, verdict in by_severity.items() if severity in severities), RIGHT)

    def fixed_scheduler(self) -> Any:
        """A scheduler of a diffusers class with all issues fixed, for `pipe.scheduler`.

        Raises:
            ValueError: an error remains that no config change fixes; the message gives the remedy.
        """
        after = self.fixed()
        errors = [finding for finding in after.findings if finding.severity == "error"]
        if errors:
            told = " ".join(f"{finding.name}: {finding.what}. {one_line(finding.remedy)}" for finding in errors)
            raise ValueError(f"Changing the scheduler does not fix this. {told}")
        return after.setup.scheduler_class.from_config(after.config)

    def fixed(self) -> "Audit":
        """The audit after applying fixes until none is left; itself if there is nothing to fix."""
        result = self
        for _ in range(_MAX_PASSES):
            # Errors come first and take precedence over notes.
            fixes = [finding.fix or {} for finding in reversed(result.findings)]
            changes = {key: value for fix_of_one in fixes for key, value in fix_of_one.items()}
            if not changes:
                break
            source = result.setup.source
            index = dict(source.index)
            if "scheduler" in index and "_class_name" in changes:
                index["scheduler"] = ["diffusers", changes["_class_name"]]
            config = {**source.config, **changes}
            if result.setup.flow and "_class_name" in changes:  # unlike classes share few settings
                config = drop_unaccepted_keys(config)
            made = replace(source, config=config, index=index, assigned={}, live=None, published=False)
            result = audit_source(made, result.setup.numbers)
        return result

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON-serializable values, with the paper's schedules as `reference`."""
        names = [name for name in self.__dataclass_fields__ if name not in ("setup", "invariance", "luminance")]
        values = {name: getattr(self, name) for name in names}
        values["findings"] = [asdict(finding) | {"remedy": one_line(finding.remedy)} for finding in self.findings]
        for name in ("invariance", "luminance"):
            part = getattr(self, name)
            values[name] = None if part is None else asdict(part)
        reference = {name: {"terminal_snr": s, "terminal_alpha": a} for name, (s, a) in paper_terminal_snrs().items()}
        plain: dict[str, Any] = _to_json_types(
            {**values, "ok": self.ok, "verdict": self.verdict, "reference": reference}
        )
        return plain

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report: settings next to the expected ones and the paper's, findings, the verdict."""
        yield Text(self.source + (f", {self.pipeline}" if self.pipeline not in (None, self.source) else ""), "title")
        yield KeyValues(
            ("", "this model", "expected"), tuple(self._setting_rows()), aside=" (expected: {})", indent="  "
        )
        rows = [("this model", self.terminal_snr, self.terminal_alpha)]
        rows += [(name, ratio, alpha) for name, (ratio, alpha) in paper_terminal_snrs().items()]
        yield Table(
            ("", "SNR(T)", "sqrt(alpha_bar_T)"),
            tuple((name, f"{ratio:.4g}", f"{alpha:.4g}") for name, ratio, alpha in rows),
            align="<<<",
            reference=len(rows) - 1,
            indent="  ",
        )
        if self.invariance is not None:
            yield from self.invariance.parts()
        if self.luminance is not None:
            part = self.luminance
            yield Text(f"luminance of {part.n} images: mean {part.mean:.3f}, {part.p5:.3f} to {part.p95:.3f}")
        if self.findings:
            yield Remarks(tuple(finding.remark for finding in self.findings))
        yield Text(f"verdict: {self.verdict}", _TONES[self.verdict])

    @property
    def _first_timesteps_text(self) -> str:
        """First timestep at each step count, as printed in the report."""
        return ", ".join(f"{t:g} at {n} steps" for n, t in self.first_timesteps) or "not known"

    def _setting_rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, value and expected value of each setting in the report; the last is empty if any value is fine."""
        betas = ", trained_betas" if self.trained_betas else ""
        phi = "not recorded" if self.guidance_rescale is None else f"{self.guidance_rescale:g}"
        final = "not configured" if self.final_alpha is None else f"{self.final_alpha:.6g}"
        numbers = len(self.steps_tried) or "no"
        yield "scheduler", f"{self.scheduler}, rescale_betas_zero_snr={self.rescale_betas_zero_snr}{betas}", ""
        yield "prediction type", self.prediction_type, ""
        yield "timestep spacing", self.timestep_spacing or "of its own", ""
        yield "first timesteps", self._first_timesteps_text, str(self.num_train_timesteps - 1)
        yield "final sqrt(alpha_bar)", final, "1"
        yield "guidance rescale", phi, ""
        if k := self.keep_low_frequencies:
            yield "frequencies kept", f"the lowest {k} x {k}", ""
        yield "tested at", f"{numbers} step counts", ""


@dataclass(frozen=True, repr=False)
class FlowAudit(Audit):
    """The report of a flow-matching model: its levels are (1 - s, s), so its first step is at zero SNR if s is 1.

    `terminal_alpha` is 1 - s there, and `first_timesteps` should be T, which the network calls flow time 1.
    """

    def parts(self) -> Iterator[Part]:
        """Parts of the printed report of a flow model, which has no table of SNR(T)."""
        return (part for part in super().parts() if not isinstance(part, Table))

    def _setting_rows(self) -> Iterator[tuple[str, str, str]]:
        setup = self.setup
        assert isinstance(setup, FlowSchedulerUnderTest)
        first = "0" if self.config.get("invert_sigmas") else str(self.num_train_timesteps)
        shift = "depends on the image size" if self.config.get("use_dynamic_shifting") else f"{setup.shift:g}"
        yield "scheduler", f"{self.scheduler}, flow matching, shift {shift}", ""
        yield "prediction type", self.prediction_type, ""
        yield "first timesteps", self._first_timesteps_text, first
        if path := setup.flow_times_by_steps.get(REPORTED_STEPS[0]):
            even = [*trailing_times(REPORTED_STEPS[0], setup.shift), 0.0]
            right = "" if setup.is_distilled or setup.is_from_this_package else _format_sigmas(even)
            yield f"sigmas of {REPORTED_STEPS[0]} steps", _format_sigmas(path), right
        yield "passed by the pipeline", "sigmas" if setup.passes_sigmas else "the step count", ""
        numbers = len(self.steps_tried) or "no"
        yield "tested at", f"{numbers} step counts", ""


def _format_sigmas(path: Iterable[float]) -> str:
    return ", ".join(f"{s:.3g}" for s in path)


def _to_json_types(value: Any) -> Any:
    """A JSON-serializable value: arrays as lists, infinity and NaN as strings."""
    if isinstance(value, dict):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # betas may be an array
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return [_to_json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no infinity
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def audit_source(source: Source, numbers: Sequence[int] | None = None) -> Audit:
    """Create the scheduler that a source describes, run all checks on it, and report; `numbers` are step counts."""
    flow = is_flow_source(source)
    setup = build_flow_scheduler_under_test(source, numbers) if flow else build_scheduler_under_test(source, numbers)
    config = setup.config
    level = setup.terminal_level
    return (FlowAudit if flow else Audit)(
        source=source.name,
        scheduler=setup.scheduler_class.__name__,
        pipeline=source.index.get("_class_name") if source.index else None,
        prediction_type=config["prediction_type"],
        terminal_snr=float(snr(level)),
        terminal_alpha=float(level.alpha),
        num_train_timesteps=len(setup.trained),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
        timestep_spacing=config.get("timestep_spacing"),
        first_timesteps=setup.first_timesteps,
        final_alpha=None if setup.final_level is None else float(setup.final_level.alpha),
        trained_betas=config.get("trained_betas") is not None,
        guidance_rescale=source.guidance_rescale,
        keep_low_frequencies=source.keep_low_frequencies,
        steps_tried=tuple(run.num_inference_steps for run in setup.simulations),
        findings=run_checks(setup),
        config=source.config,
        setup=setup,
    )

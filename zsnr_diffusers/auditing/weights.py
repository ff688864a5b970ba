"""What only the weights show: whether the network ignores the terminal noise, and how bright its images are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .finding import Finding
from .report import Audit

if TYPE_CHECKING:
    from ..evaluation import TerminalInvariance

MAX_NOISE_SHARE = 0.5
"""Fraction of the x_0 prediction at T that depends on the noise, above which the network was not trained there. At
zero SNR, an ideal network has 0; the flawed model of the quickstart has 0.92.
"""

NUM_IMAGES = 8
"""Per prompt."""


def audit_weights(result: Audit, prompts: Sequence[str] | Sequence[int] | None, device: Any) -> Audit:
    """Add to an audit what the weights show, except for a scheduler alone, a single file or a flow-matching model.

    Args:
        result: the audit of the config.
        prompts: texts or class labels; None for an unconditional model, and for the empty text.
        device: device of its networks, if it is loaded here.

    Raises:
        OSError, ValueError: no pipeline can be loaded, or prompts do not fit it.
    """
    found = result.setup.source
    if not found.has_weights or result.setup.flow or _has_no_x_0_prediction(result):
        return result
    pipe = found.pipeline
    if pipe is None:
        from ..hub.load import load_pipeline

        pipe = load_pipeline(found.saved)  # without what the caller knows, since the config is audited
        pipe = pipe if device is None else pipe.to(device)
    return check_weights(result, pipe, prompts)


def _has_no_x_0_prediction(result: Audit) -> bool:
    """Whether an epsilon model at zero SNR has no x_0 prediction at T; the findings report it already."""
    return bool(result.prediction_type == "epsilon" and result.terminal_snr == 0)


def check_weights(result: Audit, pipe: Any, prompts: Sequence[str] | Sequence[int] | None, **call: Any) -> Audit:
    """Add terminal invariance and luminance of a loaded pipeline to an audit; `call` is for `iter_images`."""
    from ..evaluation import LuminanceSummary, iter_images, mean_luminance, terminal_invariance

    if _has_no_x_0_prediction(result):
        return result
    text = hasattr(pipe, "encode_prompt")
    invariance = terminal_invariance(pipe, [""] if prompts is None and text else prompts)
    luminance = None
    if prompts:
        asked: Any = [prompt for prompt in prompts for _ in range(NUM_IMAGES)]
        images = iter_images(pipe, asked, range(len(asked)), **call)
        luminance = LuminanceSummary.of(mean_luminance(images))
    findings = (*_check_terminal_invariance(invariance), *result.findings)
    return replace(result, findings=findings, invariance=invariance, luminance=luminance)


def _check_terminal_invariance(invariance: "TerminalInvariance") -> Iterator[Finding]:
    """Report a network whose x_0 prediction at T depends on the noise although the schedule has zero SNR."""
    if invariance.alpha == 0 and invariance.share > MAX_NOISE_SHARE:
        what = (
            f"{invariance.share:.2f} of the x_0 prediction at T depends on the noise: it was not trained at zero "
            "terminal SNR"
        )
        remedy = "retrain it:\naccelerate launch -m zsnr_diffusers.training --help"
        yield Finding("not-trained-there", "error", what, remedy)

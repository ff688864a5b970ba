"""The two kinds of training schedules, betas and flow times."""

from typing import Any

from torch import Tensor

from ..core import SCHEDULE_NAMES, schedule_table
from ..hub.model_card import terminal_snr
from ..schedulers import FlowMatchMultistepScheduler
from ..schedulers.base import ZeroSNRScheduler
from ..schedulers.config import is_flow
from ..schedulers.flow import FlowMatchScheduler

Schedule = ZeroSNRScheduler | FlowMatchScheduler


def betas_alpha_bar(betas: ZeroSNRScheduler | None) -> Tensor:
    """alpha_bar of the betas whose SNRs a flow model is trained on, float64 [T].

    Args:
        betas: at zero terminal SNR; None of a flow-matching base.

    Raises:
        ValueError: there are none.
    """
    if betas is None:
        raise ValueError(
            "--flow_time_sampling=snr is the density of betas, but the base is a flow-matching model, which has "
            "none: pass logit_normal or uniform."
        )
    return schedule_table(**{key: betas.config[key] for key in SCHEDULE_NAMES})


def preview_scheduler(scheduler: Any) -> Any:
    """The scheduler for previews of a base: its own, or for a flow-matching one ours, which runs in every pipeline."""
    return FlowMatchMultistepScheduler.from_config(scheduler.config) if is_flow(scheduler.config) else scheduler


def check_base_schedule(scheduler: Any, name: str, prediction_type: str) -> None:
    """Refuse a base model whose schedule cannot be trained to a prediction type.

    Args:
        scheduler: of the base.
        name: of the base.
        prediction_type: that the network is trained to.

    Raises:
        ValueError: with what the base is and what to pass.
    """
    config = scheduler.config
    if not is_flow(config):
        return
    if prediction_type != "flow_prediction":
        raise ValueError(
            f"{name} is a flow-matching model, which has no betas for {prediction_type}: pass --prediction_type "
            "flow_prediction, and no --flow_through_bridge."
        )
    if config.get("invert_sigmas") or config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"{name} is an unsupported kind of flow model: only networks that predict noise - x_0 from timesteps 1000 "
            "s can be trained."
        )


def check_zero_snr_base(scheduler: Any, name: str, option: str) -> None:
    """Refuse a base model that is not yet what an option needs: one that predicts v at zero terminal SNR.

    Args:
        scheduler: of the base.
        name: of the base.
        option: that needs it.

    Raises:
        ValueError: it does not predict v at zero terminal SNR.
    """
    kind, end = scheduler.config.get("prediction_type", "epsilon"), terminal_snr(scheduler)
    if kind != "v_prediction" or end > 0:
        raise ValueError(
            f"{option} needs a base that predicts v at zero terminal SNR; {name} predicts {kind} with a "
            f"schedule that ends at an SNR of {end:.4g}. Leave it out, or train the base with v_prediction first."
        )

"""Training objective: prediction type, noise levels, and their loss weights."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...core.choices import FlowTimeSampling, check_loss_weighting, check_prediction_type, check_shift
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option

FLOW = "flow_prediction"


@dataclass
class FlowConfig(Options):
    """Options for flow matching: density of flow times, and conversion of a v-prediction base."""

    flow_time_sampling: Annotated[FlowTimeSampling, IDENTITY] = option(  # noqa: RUF009
        "logit_normal",
        "With --prediction_type flow_prediction, the density of flow time s, which is 0 at clean data and 1 at pure "
        "noise. logit_normal: log(s / (1 - s)) is normal, by --logit_mean and --logit_std: as in Stable Diffusion 3, "
        "--weighting_scheme logit_normal in diffusers' scripts. uniform: --weighting_scheme none there. snr: the SNR "
        "density of the betas of the base, or of a new pixel-space network, at zero terminal SNR.",
    )
    logit_mean: Annotated[float, IDENTITY] = option(
        0.0, "Mean of logit_normal: above 0 emphasizes high noise, which determines brightness and layout."
    )
    logit_std: Annotated[float, POSITIVE, IDENTITY] = option(1.0, "Standard deviation of logit_normal.")
    flow_shift: Annotated[float, POSITIVE, IDENTITY] = option(
        1.0,
        "Multiplies sigma / alpha of every flow time, in training and in the saved scheduler: 3 in Stable Diffusion "
        "3, for large images.",
    )
    flow_through_bridge: Annotated[bool, IDENTITY] = option(
        False,
        "For a v-prediction base at zero terminal SNR: train it as the flow model to which it is exactly equivalent. "
        "The network remains a v-prediction model with betas, so training starts from the base's behavior; only the "
        "loss and the times are those of a flow model, and the result is a v-prediction pipeline. Default: the "
        "network itself becomes a flow model, with the inputs x_s and 1000 s. A flow-matching base then keeps its "
        "behavior; a base that predicts v or epsilon keeps only its weights, has to learn the new inputs, and "
        "generates noise in the first steps of training.",
    )

    def describe_flow_times(self) -> str:
        """The density of trained flow times, in words."""
        density = {
            "logit_normal": f"logit-normal({self.logit_mean:g}, {self.logit_std:g})",
            "uniform": "uniform",
            "snr": "of the SNRs of the betas",
        }[self.flow_time_sampling]
        return f"{density}, shift {self.flow_shift:g}"

    def check_unused_flow_options(self, flow: bool) -> None:
        """Refuse flow-matching options that would have no effect.

        Raises:
            ValueError: options for flow matching without flow matching, or for another density.
        """
        defaults: dict[str, Any] = {"flow_time_sampling": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}
        defaults |= {"flow_shift": 1.0, "flow_through_bridge": False}
        values = {name: getattr(self, name) for name in defaults}
        changed = {name: f"--{name}={value}" for name, value in values.items() if value != defaults[name]}
        if changed and not flow:
            raise ValueError(
                f"{', '.join(changed.values())}: only for flow matching; pass --prediction_type {FLOW}, or omit them."
            )
        idle = [text for name, text in changed.items() if name.startswith("logit_")]
        if idle and self.flow_time_sampling != "logit_normal":
            raise ValueError(
                f"{', '.join(idle)}: only for --flow_time_sampling logit_normal, not {self.flow_time_sampling}; omit "
                "one of them."
            )


@dataclass
class ObjectiveConfig(FlowConfig):
    """Training objective: prediction type, schedule, timestep weights."""

    prediction_type: Annotated[str, IDENTITY] = option(
        "v_prediction",
        "Prediction type of the UNet: v_prediction; flow_prediction, noise - x_0 at (1 - s) x_0 + s noise (rectified "
        "flow, as in Stable Diffusion 3 and Flux), with the --flow_ options; or epsilon or sample for comparison.",
    )
    rescale_betas_zero_snr: Annotated[bool, IDENTITY] = option(
        True,
        "Train at zero terminal SNR. False keeps the original schedule, for comparison. Flow matching begins at pure "
        "noise anyway.",
    )
    loss_weighting: Annotated[
        Literal["constant", "min_snr_floored", "soft_min_snr_floored", "learned_uncertainty", "min_snr"], IDENTITY
    ] = option(
        "constant",
        "Weight of each timestep in the loss. constant: 1 (the paper). min_snr_floored, soft_min_snr_floored: lower "
        "for timesteps with little noise, but still 1 for the last one with v-prediction. learned_uncertainty: each "
        "loss divided by its learned expected value (EDM2); the logged loss can then be negative. min_snr: refused "
        "at zero terminal SNR, where the last timestep would have weight 0 and remain untrained. Each is the same "
        "x_0 loss for every prediction type; constant is 1 for the error of the prediction itself.",
    )
    snr_gamma: Annotated[float, POSITIVE, IDENTITY] = option(
        5.0, "SNR above which the min_snr weightings reduce the weight."
    )
    timestep_sampling: Annotated[Literal["uniform", "stratified", "antithetic"], IDENTITY] = option(
        "uniform",
        "How timesteps are sampled; each is uniformly distributed (flow times: over the quantiles of their density). "
        "uniform: independently. stratified: one from each of equal strata, over the global batch of a step. "
        "antithetic: in pairs t and T - 1 - t. The last two reduce the variance of the loss.",
    )
    noise_offset: Annotated[float, NOT_NEGATIVE, IDENTITY] = option(
        0.0,
        "Standard deviation of a constant noise offset per channel, for comparison: another remedy for medium "
        "brightness. Refused at zero terminal SNR, which makes it unnecessary and requires N(0, I) at the last "
        "timestep.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_unused_flow_options(self.is_flow)
        if self.is_flow:
            self._check_flow()
        else:
            check_prediction_type(self.prediction_type, zero_terminal_snr=self.rescale_betas_zero_snr)
        self.check_schedule(zero_terminal_snr=self.rescale_betas_zero_snr)

    @property
    def is_flow(self) -> bool:
        """Whether the loss is that of a flow-matching model."""
        return self.prediction_type == FLOW

    @property
    def network_prediction(self) -> str:
        """Prediction type of the network itself, and thus of the saved model."""
        return "v_prediction" if self.flow_through_bridge else self.prediction_type

    def _check_flow(self) -> None:
        """Refuse options that are not compatible with flow matching."""
        check_shift(self.flow_shift)
        if not self.rescale_betas_zero_snr:
            raise ValueError(
                "--rescale_betas_zero_snr=False applies to betas, but flow matching has none: flow time 1 is pure "
                "noise. Omit it with --prediction_type {FLOW}."
            )
        if self.loss_weighting == "min_snr":
            raise ValueError(
                "--loss_weighting=min_snr gives flow time 1, pure noise, weight 0. For flow matching, use constant, "
                "min_snr_floored, soft_min_snr_floored or learned_uncertainty."
            )
        if self.noise_offset:
            raise ValueError(
                f"--noise_offset={self.noise_offset} cannot be used with flow matching: the noise at flow time 1 "
                "would not be N(0, I), from which sampling starts. Omit it: starting from pure noise already solves "
                "the problem."
            )

    def check_schedule(self, zero_terminal_snr: bool) -> None:
        """Refuse a loss weighting or noise offset that is not compatible with zero terminal SNR.

        Raises:
            ValueError: with the value and the remedy.
        """
        check_loss_weighting(self.loss_weighting, zero_terminal_snr, self.snr_gamma)
        if self.noise_offset and zero_terminal_snr:
            raise ValueError(
                f"--noise_offset={self.noise_offset} cannot be used at zero terminal SNR: the noise at the last "
                "timestep would not be N(0, I), from which sampling starts. Omit it, since zero terminal SNR already "
                "solves the problem; for a comparison, pass --rescale_betas_zero_snr=False."
            )

    def describe_loss(self) -> str:
        """Description of the training loss, for the model card."""
        weight = "weight 1 at every timestep"
        if self.loss_weighting != "constant":
            gamma = f" with gamma {self.snr_gamma:g}" if "min_snr" in self.loss_weighting else ""
            weight = f"weights `{self.loss_weighting}`{gamma}"
        offset = f", noise offset {self.noise_offset:g}" if self.noise_offset else ""
        if self.is_flow:
            weight = weight.replace("timestep", "flow time") + f", flow times {self.describe_flow_times()}"
        bridge = ", by an exact conversion of `v_prediction`" if self.flow_through_bridge else ""
        return f"mean squared error of `{self.prediction_type}`{bridge}, {weight}{offset}"

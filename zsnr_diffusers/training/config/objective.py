"""What a network learns: its prediction, the noise that it is trained at, and the weight of each noise level."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...core.choices import FlowTimeSampling, check_loss_weighting, check_prediction_type, check_shift
from .options import IDENTITY, NOT_NEGATIVE, POSITIVE, Options, option

FLOW = "flow_prediction"


@dataclass
class FlowConfig(Options):
    """Of flow matching alone: the flow times that are trained, and what becomes of a base that predicts v."""

    flow_time_sampling: Annotated[FlowTimeSampling, IDENTITY] = option(  # noqa: RUF009
        "logit_normal",
        "With --prediction_type flow_prediction, the density of flow time s, which is 0 at clean data and 1 at pure "
        "noise. logit_normal: log(s / (1 - s)) is normal, by --logit_mean and --logit_std: Stable Diffusion 3's, and "
        "--weighting_scheme logit_normal of diffusers' scripts. uniform: --weighting_scheme none there. snr: that of "
        "the betas of the base, or of a new pixel-space network, at zero terminal SNR.",
    )
    logit_mean: Annotated[float, IDENTITY] = option(
        0.0, "Mean of logit_normal: above 0 trains more noise, which is where brightness and layout are."
    )
    logit_std: Annotated[float, POSITIVE, IDENTITY] = option(1.0, "Standard deviation of logit_normal.")
    flow_shift: Annotated[float, POSITIVE, IDENTITY] = option(
        1.0,
        "Multiplies sigma / alpha of every flow time, in training and in the scheduler that is saved: 3 in Stable "
        "Diffusion 3, for large images.",
    )
    flow_through_bridge: Annotated[bool, IDENTITY] = option(
        False,
        "For a base that predicts v at zero terminal SNR: train it as the flow model that it is by an exact "
        "conversion. The network stays a v model on its betas, so it starts where the base is, only the loss and "
        "the times are those of a flow model, and what is saved is a v pipeline. Default: the network becomes a flow "
        "model itself, with the inputs x_s and 1000 s. Then a base that is one already starts where it is; one that "
        "predicts v or epsilon starts from its weights, has new inputs to learn, and generates noise for the first "
        "steps.",
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
            ValueError: options of flow matching without it, or of a density that was not chosen.
        """
        defaults: dict[str, Any] = {"flow_time_sampling": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}
        defaults |= {"flow_shift": 1.0, "flow_through_bridge": False}
        values = {name: getattr(self, name) for name in defaults}
        changed = {name: f"--{name}={value}" for name, value in values.items() if value != defaults[name]}
        if changed and not flow:
            raise ValueError(
                f"{', '.join(changed.values())}: of flow matching alone; pass --prediction_type {FLOW}, or leave out "
                "what is of it."
            )
        idle = [text for name, text in changed.items() if name.startswith("logit_")]
        if idle and self.flow_time_sampling != "logit_normal":
            raise ValueError(
                f"{', '.join(idle)}: of --flow_time_sampling logit_normal, and it is {self.flow_time_sampling}; leave "
                "out one of them."
            )


@dataclass
class ObjectiveConfig(FlowConfig):
    """What the network learns: prediction, schedule, weights of timesteps."""

    prediction_type: Annotated[str, IDENTITY] = option(
        "v_prediction",
        "What the UNet learns: v_prediction; flow_prediction, noise - x_0 at (1 - s) x_0 + s noise (rectified flow, "
        "the kind of Stable Diffusion 3 and Flux), with the options of --flow_; or epsilon or sample to compare.",
    )
    rescale_betas_zero_snr: Annotated[bool, IDENTITY] = option(
        True,
        "Train on zero terminal SNR. False keeps the schedule as it is, to compare. Flow matching begins at pure "
        "noise anyway.",
    )
    loss_weighting: Annotated[
        Literal["constant", "min_snr_floored", "soft_min_snr_floored", "learned_uncertainty", "min_snr"], IDENTITY
    ] = option(
        "constant",
        "Weight of each timestep in the loss. constant: 1 (the paper). min_snr_floored, soft_min_snr_floored: less "
        "for timesteps of little noise, and still 1 for the last one under v-loss. learned_uncertainty: each loss "
        "over its expected size, learned on the way (EDM2); what is then logged as loss may be negative. min_snr: "
        "refused on zero terminal SNR, where the last timestep would have weight 0 and stay untrained. Each is the "
        "same loss of x_0 whatever is predicted; constant is 1 for the error of the prediction itself.",
    )
    snr_gamma: Annotated[float, POSITIVE, IDENTITY] = option(
        5.0, "SNR above which timesteps weigh less in the min_snr weightings."
    )
    timestep_sampling: Annotated[Literal["uniform", "stratified", "antithetic"], IDENTITY] = option(
        "uniform",
        "How timesteps are drawn; each is uniform over all of them, and each flow time over the quantiles of its "
        "density. uniform: independently. stratified: one from each part of an even division, over the global batch "
        "of a step. antithetic: in pairs t and T - 1 - t. The last two make the loss of a step vary less.",
    )
    noise_offset: Annotated[float, NOT_NEGATIVE, IDENTITY] = option(
        0.0,
        "Standard deviation of noise that each channel gets as a whole, to compare: another remedy for images of "
        "medium brightness, refused on zero terminal SNR, which replaces it: there the last timestep must be N(0, I).",
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
        """Prediction type of the network itself, and so of the saved model."""
        return "v_prediction" if self.flow_through_bridge else self.prediction_type

    def _check_flow(self) -> None:
        """Refuse options that flow matching cannot have."""
        check_shift(self.flow_shift)
        if not self.rescale_betas_zero_snr:
            raise ValueError(
                "--rescale_betas_zero_snr=False is of betas, and flow matching has none: flow time 1 is pure noise. "
                f"Leave it out with --prediction_type {FLOW}."
            )
        if self.loss_weighting == "min_snr":
            raise ValueError(
                "--loss_weighting=min_snr gives flow time 1, pure noise, weight 0. What holds for flow matching is "
                "constant, min_snr_floored, soft_min_snr_floored and learned_uncertainty."
            )
        if self.noise_offset:
            raise ValueError(
                f"--noise_offset={self.noise_offset} cannot be used with flow matching: at flow time 1 there would be "
                "noise of another distribution than N(0, I), from which sampling starts. Leave it out: pure noise at "
                "the start does what the offset is for."
            )

    def check_schedule(self, zero_terminal_snr: bool) -> None:
        """Refuse a loss weighting or noise offset that zero terminal SNR cannot have.

        Raises:
            ValueError: with the value and what to do instead.
        """
        check_loss_weighting(self.loss_weighting, zero_terminal_snr, self.snr_gamma)
        if self.noise_offset and zero_terminal_snr:
            raise ValueError(
                f"--noise_offset={self.noise_offset} cannot be used at zero terminal SNR: the last timestep would be "
                "noise of another distribution than N(0, I), from which sampling starts. Zero terminal SNR does what "
                "the offset is for: leave it out; to compare, pass --rescale_betas_zero_snr=False."
            )

    def describe_loss(self) -> str:
        """The training loss in words, for the model card."""
        weight = "weight 1 at every timestep"
        if self.loss_weighting != "constant":
            gamma = f" with gamma {self.snr_gamma:g}" if "min_snr" in self.loss_weighting else ""
            weight = f"weights `{self.loss_weighting}`{gamma}"
        offset = f", noise offset {self.noise_offset:g}" if self.noise_offset else ""
        if self.is_flow:
            weight = weight.replace("timestep", "flow time") + f", flow times {self.describe_flow_times()}"
        bridge = ", by an exact conversion of `v_prediction`" if self.flow_through_bridge else ""
        return f"mean squared error of `{self.prediction_type}`{bridge}, {weight}{offset}"

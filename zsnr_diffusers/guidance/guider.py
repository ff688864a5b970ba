"""A diffusers guider that keeps low frequencies, for modular pipelines and anywhere else that accepts a guider.

In a separate module, since diffusers' guiders take seconds to import.
"""

from typing import Any

from diffusers.guiders import ClassifierFreeGuidance, guider_utils
from torch import Tensor

from ..core.choices import DEFAULT_KEEP_LOW_FREQUENCIES, check_guidance_rescale, check_keep_low_frequencies
from ..core.guidance import classifier_free_guidance, rescale_guidance
from ..core.low_frequencies import keep_low_frequencies


class KeepLowFrequenciesGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose lowest k x k frequencies are those of the conditional prediction.

    ```python
    pipe = modular_blocks.init_pipeline("path/or/hub-id")
    pipe.update_components(guider=KeepLowFrequenciesGuidance(7.5, keep_low_frequencies=4))
    ```

    Equivalent to `enable_guidance_rescale(pipe, guidance_rescale, keep_low_frequencies=k)`; see also
    `zsnr_diffusers.core.low_frequencies`. Predictions have shape [B, C, H, W], or for video any shape with height and
    width last.

    Args:
        guidance_scale: w in u + w (c - u); at 1 it is off.
        keep_low_frequencies: k, at least 0; 0 is off.
        guidance_rescale: phi of Lin et al. 2023 (arXiv:2305.08891), Algorithm 2, 0 to 1; 0 is off.
        use_original_formulation: use c + w (c - u), where 0 is off.
        start: fraction of the steps after which guidance begins, 0 to 1.
        stop: fraction of the steps after which it ends, 0 to 1.
        enabled: whether guidance is enabled.

    Raises:
        ValueError: guidance_rescale outside [0, 1], an invalid keep_low_frequencies, or start or stop out of range;
            when called, predictions without height and width, such as packed tokens.

    Examples:
        >>> from zsnr_diffusers import KeepLowFrequenciesGuidance
        >>> guider = KeepLowFrequenciesGuidance(7.5, keep_low_frequencies=4)
        >>> guider.num_conditions
        2
    """

    def __init__(
        self,
        guidance_scale: float = 7.5,
        keep_low_frequencies: int = DEFAULT_KEEP_LOW_FREQUENCIES,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        check_keep_low_frequencies(keep_low_frequencies)
        check_guidance_rescale(guidance_rescale)
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop)
        self.keep_low_frequencies = keep_low_frequencies
        if not enabled:  # not supported by the oldest guiders
            self.disable()
        # The base class registered its arguments as defaults, which `from_config` would reset.
        ours = {"keep_low_frequencies": int(keep_low_frequencies), "enabled": enabled}
        self.register_to_config(**ours, _use_default_values=[])

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """The guided prediction, in the return type of the installed diffusers' guiders.

        Args:
            pred_cond: conditional prediction, shape [B, C, H, W] or [B, ..., H, W].
            pred_uncond: unconditional prediction, same shape; None if guidance is off.
        """
        guided = pred_cond
        if pred_uncond is not None and self.num_conditions == 2:
            # c + w (c - u) = u + (w + 1) (c - u)
            scale = self.guidance_scale + 1 if self.use_original_formulation else self.guidance_scale
            guided = classifier_free_guidance(pred_uncond, pred_cond, scale)
            guided = rescale_guidance(guided, pred_cond, self.guidance_rescale)
            guided = keep_low_frequencies(guided, pred_cond, self.keep_low_frequencies)
        if not hasattr(guider_utils, "GuiderOutput"):  # before diffusers 0.36
            return guided, {}
        return guider_utils.GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

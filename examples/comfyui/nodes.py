"""The nodes: inputs, outputs and nothing else. What they do is in `sampling.py` and in zsnr_diffusers."""

from typing import Any

import torch

from zsnr_diffusers import core
from zsnr_diffusers.hub.saved_model import SavedModel

from .sampling import kappa_sigmas, sample_multistep

CATEGORY = "zsnr"


class ZeroSNRMultistepSampler:
    """The sampler, for *SamplerCustom* and *SamplerCustomAdvanced*."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = "Keeps its order from pure noise on; for v-prediction, epsilon and flow models."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Inputs of the node."""
        return {
            "required": {
                "solver_order": (
                    "INT",
                    {"default": 3, "min": 1, "max": 3, "tooltip": "at most 2 below 20 steps"},
                ),
                "eta": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "fresh noise"}),
            }
        }

    def get_sampler(self, solver_order: int, eta: float) -> tuple[Any]:
        """The sampler with these options."""
        from comfy.samplers import KSAMPLER

        return (KSAMPLER(sample_multistep, extra_options={"solver_order": solver_order, "eta": eta}),)


class ZeroSNRKappaScheduler:
    """Sigmas for the sampler."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    CATEGORY = CATEGORY
    DESCRIPTION = "Steps where the image changes, from pure noise if the model was trained on it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 12, "min": 1, "max": 1000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    def get_sigmas(self, model: Any, steps: int, denoise: float) -> tuple[torch.Tensor]:
        """Sigmas of all steps or, for image-to-image, of the last ones; as many in either case, as in ComfyUI."""
        if denoise <= 0:
            return (torch.empty(0),)
        sigmas = kappa_sigmas(model.get_model_object("model_sampling"), int(steps / denoise))
        return (sigmas[-(steps + 1) :],)


class ZeroSNRModelSampling:
    """*ModelSamplingDiscrete* with the settings that a checkpoint records."""

    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "found")
    FUNCTION = "patch"
    CATEGORY = CATEGORY
    DESCRIPTION = "Sets v-prediction and zero terminal SNR as the checkpoint records them, wherever zsnr audit looks."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Inputs of the node."""
        import folder_paths

        return {"required": {"model": ("MODEL",), "ckpt_name": (folder_paths.get_filename_list("checkpoints"),)}}

    def patch(self, model: Any, ckpt_name: str) -> tuple[Any, str]:
        """The model with the right sampling, and what the file says; unchanged if it says nothing.

        Raises:
            ValueError: the file records a prediction type that ComfyUI has no sampling for.
        """
        import folder_paths
        from comfy import model_sampling as kinds

        saved = SavedModel.open(folder_paths.get_full_path_or_raise("checkpoints", ckpt_name))
        if saved.prediction_type is None:
            return model, f"{ckpt_name} does not record what it predicts; nothing is changed."
        bases = {
            "epsilon": (kinds.ModelSamplingDiscrete, kinds.EPS),
            "v_prediction": (kinds.ModelSamplingDiscrete, kinds.V_PREDICTION),
            "flow_prediction": (kinds.ModelSamplingDiscreteFlow, kinds.CONST),
        }
        if saved.prediction_type not in bases:
            raise ValueError(f"{ckpt_name} predicts {saved.prediction_type}, for which ComfyUI has no sampling.")
        options = {} if saved.prediction_type == "flow_prediction" else {"zsnr": bool(saved.rescale_betas_zero_snr)}
        sampling = type("ModelSampling", bases[saved.prediction_type], {})(model.model.model_config, **options)
        patched = model.clone()
        patched.add_object_patch("model_sampling", sampling)
        found = ", ".join([saved.prediction_type, *(["zero terminal SNR"] if options.get("zsnr") else [])])
        return patched, f"{ckpt_name}: {found} (from {saved.authority('prediction_type').source})"


class KeepLowFrequenciesGuidance:
    """Guidance that leaves brightness and the coarsest structure to the conditional prediction."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = CATEGORY
    DESCRIPTION = "Keeps guidance from exaggerating brightness; may follow RescaleCFG."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "keep_low_frequencies": ("INT", {"default": 4, "min": 0, "max": 64, "tooltip": "per side; 0 is off"}),
            }
        }

    def patch(self, model: Any, keep_low_frequencies: int) -> tuple[Any]:
        """The model whose guided x_0 has the lowest frequencies of the conditional one."""

        def keep(args: dict[str, Any]) -> torch.Tensor:
            return core.keep_low_frequencies(args["denoised"], args["cond_denoised"], keep_low_frequencies)

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(keep)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (ZeroSNRMultistepSampler, ZeroSNRKappaScheduler, ZeroSNRModelSampling, KeepLowFrequenciesGuidance)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ZeroSNRMultistepSampler": "Zero-SNR Multistep Sampler",
    "ZeroSNRKappaScheduler": "Zero-SNR Kappa Scheduler",
    "ZeroSNRModelSampling": "Zero-SNR Model Sampling",
    "KeepLowFrequenciesGuidance": "Keep Low Frequencies",
}

"""A pixel-space pipeline for a class-conditional `UNet2DModel`."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .core import classifier_free_guidance
from .guidance.mixin import GuidanceRescaleMixin

_THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
"""Config keys of schedulers with dynamic thresholding."""


class ClassConditionalPipeline(GuidanceRescaleMixin, DiffusionPipeline):
    """Generates images of given classes with a pixel-space network and classifier-free guidance.

    The network's last class embedding means no class, as in DiT (Peebles & Xie 2022, arXiv:2212.09748), so a network
    for ten classes has `num_class_embeds=11`. A network without class embeddings generates unconditional images.

    Args:
        unet: predicts from (x_t, timestep, class_labels) on images in [-1, 1].
        scheduler: a scheduler of this package or of diffusers.

    Examples:
        >>> import torch
        >>> from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRMultistepScheduler, build_unet
        >>> pipe = ClassConditionalPipeline(build_unet("small-8", class_labels=10), ZeroSNRMultistepScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe([3, 7], num_inference_steps=2, guidance_scale=2.0).images
        >>> [image.size for image in images]
        [(8, 8), (8, 8)]
    """

    model_cpu_offload_seq = "unet"
    unet: UNet2DModel
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Guidance scale w of the running call, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call uses classifier-free guidance, as it does above a scale of 1."""
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining steps; a callback sets `_interrupt` for this."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        dynamic_thresholding_ratio: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image per label.

        Three options reduce saturation at a large guidance scale: `guidance_rescale` (Lin et al. 2023, section 3.4)
        and `keep_low_frequencies`, which the mixin adds, and `dynamic_thresholding_ratio` (Saharia et al. 2022,
        section 2.3).

        Args:
            class_labels: one or several classes; None for unconditional images.
            batch_size: number of images for a single label, or without labels; 1 by default.
            num_inference_steps: number of steps.
            guidance_scale: w in u + w (c - u); guidance is on above 1.
            generator: one, or one per image.
            latents: the starting noise, shape [B, C, H, W].
            dynamic_thresholding_ratio: the quantile of |x_0| that is scaled to 1 at every step where it is larger,
                0.995 in Imagen. None uses the scheduler's config.
            output_type: `pil`, `np` [B, H, W, C] or `pt` [B, C, H, W] in [0, 1], or `latent`: as sampled, not clipped
                to [-1, 1].
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x_t}) after every step; may return
                other latents.

        Raises:
            ValueError: labels out of range or for a network without classes, guidance without classes, or sizes that
                contradict each other.
        """
        labels = self._resolve_labels(class_labels, batch_size, guidance_scale)
        shape = (len(labels), self.unet.config.in_channels, *self._sample_size())
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; these labels need {shape}.")
        self._guidance_scale, self._interrupt = guidance_scale, False
        device, dtype = self._execution_device, self.unet.dtype
        x = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        conditions = labels.to(device) if self._num_classes else None
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        self._num_timesteps = len(self.scheduler.timesteps)
        with (
            self._dynamic_thresholding(dynamic_thresholding_ratio),
            self.progress_bar(total=self._num_timesteps) as bar,
        ):
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict_guided(x, timestep, conditions)
                x = self.scheduler.step(prediction, timestep, x, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, step, timestep, {"latents": x}) or {}).get("latents", x)
                bar.update()
        self.maybe_free_model_hooks()
        images = x if output_type == "latent" else VaeImageProcessor().postprocess(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict_guided(self, x: Tensor, timestep: Any, labels: Tensor | None) -> Tensor:
        """The network's prediction for x at a timestep, with classifier-free guidance if enabled."""
        x = self.scheduler.scale_model_input(x, timestep)
        if not self.do_classifier_free_guidance or labels is None:
            prediction: Tensor = self.unet(x, timestep, labels).sample
            return prediction
        both = torch.cat([torch.full_like(labels, self._num_classes), labels])
        unconditional, conditional = self.unet(torch.cat([x, x]), timestep, both).sample.chunk(2)
        return classifier_free_guidance(unconditional, conditional, self._guidance_scale)

    @property
    def _num_classes(self) -> int:
        """Number of classes of the UNet, which is also the label for no class; 0 without class embeddings."""
        embeddings = self.unet.config.num_class_embeds
        return embeddings - 1 if embeddings else 0

    def _sample_size(self) -> tuple[int, int]:
        """Height and width of the UNet's images, in pixels."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _resolve_labels(self, class_labels: Any, batch_size: int | None, guidance_scale: float) -> Tensor:
        """One class label per image, shape [B]; `_num_classes` means no class."""
        classes = self._num_classes
        if classes == 0 and (class_labels is not None or guidance_scale > 1):
            raise ValueError(
                "This network has no class embeddings (num_class_embeds), so it takes no class_labels and cannot be "
                "guided: leave both out."
            )
        if class_labels is None:
            if guidance_scale > 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs class_labels.")
            class_labels = classes
        labels = torch.as_tensor(class_labels, dtype=torch.long).cpu().reshape(-1)
        if len(labels) == 1:
            labels = labels.repeat(1 if batch_size is None else batch_size)
        if len(labels) == 0 or (batch_size is not None and batch_size != len(labels)):
            raise ValueError(f"batch_size={batch_size} for {len(labels)} class_labels: omit it, or pass one label.")
        wrong = labels[(labels < 0) | (labels > classes)]
        if len(wrong):
            raise ValueError(
                f"class_labels has {wrong[0].item()}; this network has 0 to {classes - 1}, and {classes} for no class."
            )
        return labels

    def _check_thresholding(self, ratio: float) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio={ratio} must lie in (0, 1]; Imagen has 0.995.")
        if not set(_THRESHOLDING) <= set(self.scheduler.config):
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} has no dynamic thresholding; use a scheduler of this package, or DDIM.")

    @contextmanager
    def _dynamic_thresholding(self, ratio: float | None) -> Iterator[None]:
        """Enable the scheduler's dynamic thresholding (Imagen) for one call of the pipeline."""
        if ratio is None:
            yield
            return
        self._check_thresholding(ratio)
        before = {name: self.scheduler.config[name] for name in _THRESHOLDING}
        # A maximum threshold of 1, the usual default, would be plain clipping; Imagen has no maximum.
        largest = before["sample_max_value"] if before["sample_max_value"] > 1 else float("inf")
        self.scheduler.register_to_config(
            thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=largest
        )
        try:
            yield
        finally:
            self.scheduler.register_to_config(**before)

"""The architectures of Stable Diffusion: their parts, and how the UNet is conditioned on caption and crop."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ...pipelines import ZeroSNRStableDiffusionPipeline, ZeroSNRStableDiffusionXLPipeline
from ..data.loader import Batch
from .conditioning import Conditioning, SizeConditioning
from .encoders import TextEncoder, TextEncoderPair
from .row_cache import Rows


class Architecture(ABC):
    """Everything that depends on the Stable Diffusion architecture.

    Args:
        pipeline: that training starts from.
    """

    name: ClassVar[str]
    tag: ClassVar[str]
    """On the Hub."""
    networks: ClassVar[Mapping[str, str]]
    """Their classes."""
    pipeline_class: ClassVar[type[Any]]
    """The pipeline's class."""
    rescaled_class: ClassVar[type[Any]]
    """The same with guidance rescale."""
    load_kwargs: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `from_pretrained` for parts that are not needed."""
    uses_force_upcast: ClassVar[bool]
    """Whether stock keeps an autoencoder out of float16 whose config says `force_upcast`."""
    conditioning: Conditioning

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @abstractmethod
    def pipeline_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the pipeline's class that are not components."""

    @abstractmethod
    def unsupported_reason(self) -> str | None:
        """Why a pipeline with the right networks still cannot be trained; None if it can."""

    @abstractmethod
    def text_encoder(self, clip_skip: int | None = None) -> TextEncoder:
        """The frozen encoder that makes the UNet's input of token ids; `clip_skip` as pipelines' calls have it."""

    @abstractmethod
    def predict(self, unet: Any, x_t: Tensor, timestep: Tensor, text: Rows, batch: Batch) -> Tensor:
        """The UNet's output for noisy latents under text and conditioning.

        Args:
            unet: that is trained.
            x_t: noisy latents [B, C, h, w].
            timestep: int64 [B], or float32 in flow matching.
            text: from `text_encoder`, or what is stored of it; `text` on the device, in the dtype of the UNet's
                products.
            batch: what `conditioning` gives.
        """


class StableDiffusion(Architecture):
    """1.x and 2.x: the UNet is conditioned on the states of one text encoder."""

    name, tag = "Stable Diffusion 1.x or 2.x", "stable-diffusion"
    networks: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    pipeline_class, rescaled_class = StableDiffusionPipeline, ZeroSNRStableDiffusionPipeline
    load_kwargs: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    uses_force_upcast = False

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.conditioning = Conditioning([pipeline.tokenizer])

    def pipeline_kwargs(self) -> dict[str, Any]:
        """Constructor arguments that leave out the safety checker, which makes images black."""
        return {"requires_safety_checker": False}

    def unsupported_reason(self) -> str | None:
        """Refuses UNets with conditions that neither captions nor images provide."""
        kind = self.pipeline.unet.config.addition_embed_type
        return (
            None if kind is None else f"its UNet has conditions other than the caption (addition_embed_type={kind!r})"
        )

    def text_encoder(self, clip_skip: int | None = None) -> TextEncoder:
        """The encoder of the text encoder's last states, or earlier ones."""
        texts, encoder = self.conditioning, self.pipeline.text_encoder
        if clip_skip is not None and not hasattr(encoder, "text_model"):
            # Where diffusers 0.42 looks for its norm; since transformers 5 that is the encoder's own. No submodule.
            encoder.__dict__["text_model"] = encoder
        return TextEncoder(encoder, texts.length, texts.chunks, clip_skip)

    def predict(self, unet: Any, x_t: Tensor, timestep: Tensor, text: Rows, batch: Batch) -> Tensor:
        """See `Architecture.predict`."""
        output: Tensor = unet(x_t, timestep, text["text"], return_dict=False)[0]
        return output


class StableDiffusionXL(Architecture):
    """XL: states of two text encoders, the second one's pooled output, and size and crop of the image."""

    name, tag = "Stable Diffusion XL", "stable-diffusion-xl"
    networks: ClassVar[Mapping[str, str]] = {
        **StableDiffusion.networks,
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    pipeline_class, rescaled_class = StableDiffusionXLPipeline, ZeroSNRStableDiffusionXLPipeline
    uses_force_upcast = True

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.conditioning = SizeConditioning([pipeline.tokenizer, pipeline.tokenizer_2])

    def pipeline_kwargs(self) -> dict[str, Any]:
        """Constructor arguments that record whether no caption means zeros or the encoders' output."""
        return {"force_zeros_for_empty_prompt": self.pipeline.config.force_zeros_for_empty_prompt}

    def unsupported_reason(self) -> str | None:
        """Refuses conditions that are not SDXL's, and latents of another scale."""
        unet, vae = self.pipeline.unet.config, self.pipeline.vae.config
        expected = 6 * (unet.addition_time_embed_dim or 0) + self.pipeline.text_encoder_2.config.projection_dim
        if unet.addition_embed_type != "text_time" or unet.projection_class_embeddings_input_dim != expected:
            return (
                "its UNet is not conditioned like SDXL's on the caption and six numbers of size and crop "
                "(addition_embed_type={unet.addition_embed_type!r}, projection_class_embeddings_input_dim="
                f"{unet.projection_class_embeddings_input_dim}; expected 'text_time' and {expected})"
            )
        if vae.latents_mean is not None or vae.latents_std is not None:
            return "its latents are scaled per channel (latents_mean, latents_std), unlike SDXL's"
        return None

    def text_encoder(self, clip_skip: int | None = None) -> TextEncoderPair:
        """The encoder of both text encoders' last but one states, or earlier ones, and the second's pooled output."""
        pipe = self.pipeline
        empty = self.conditioning.tokenize([""])[0] if pipe.config.force_zeros_for_empty_prompt else None
        texts = self.conditioning
        return TextEncoderPair(pipe.text_encoder, pipe.text_encoder_2, texts.length, empty, texts.chunks, clip_skip)

    def predict(self, unet: Any, x_t: Tensor, timestep: Tensor, text: Rows, batch: Batch) -> Tensor:
        """See `Architecture.predict`."""
        added = {"text_embeds": text["pooled"].to(x_t), "time_ids": batch["time_ids"].to(x_t)}
        output: Tensor = unet(x_t, timestep, text["text"], added_cond_kwargs=added, return_dict=False)[0]
        return output


ARCHITECTURES: tuple[type[Architecture], ...] = (StableDiffusion, StableDiffusionXL)
"""From which training can start."""

"""Small Stable Diffusions of the three layouts that single files have, and such files marked as others mark them."""

from functools import cache, partial

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from small_pipelines.parts import WIDTH, projecting_text_encoder, small, text_encoder, unet, vae
from small_pipelines.stable_diffusion_xl import xl_unet

from zsnr_diffusers.checkpoint_layout import original_checkpoint

KINDS = ("1", "2", "xl")
V, EPSILON = "v_prediction", "epsilon"

# Two residual blocks to a level and attention in the autoencoder, as in the models that the layouts were made for.
_UNET = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
_XL_UNET = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": WIDTH + 16,
    "projection_class_embeddings_input_dim": 12 + 6 * WIDTH,
}
_VAE = partial(vae, mid_block_add_attention=True, layers_per_block=2)
_OPEN_CLIP = partial(text_encoder, hidden_act="gelu")
_BIG_OPEN_CLIP = partial(
    projecting_text_encoder, hidden_act="gelu", hidden_size=16, projection_dim=12, num_hidden_layers=10
)

_SMALL = {
    "1": small("StableDiffusionPipeline", {"vae": _VAE, "unet": partial(unet, **_UNET)}),
    "2": small(
        "StableDiffusionPipeline",
        {"vae": _VAE, "unet": partial(unet, **_UNET, use_linear_projection=True), "text_encoder": _OPEN_CLIP},
    ),
    "xl": small(
        "StableDiffusionXLPipeline",
        {"vae": _VAE, "unet": partial(xl_unet, **_XL_UNET), "text_encoder_2": _BIG_OPEN_CLIP},
    ),
}


def sd_scheduler(prediction_type="epsilon", zero_snr=False):
    """DDIM with Stable Diffusion's betas: as first published, or as for a model of zero terminal SNR."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=zero_snr,
    )


def tiny_pipeline(kind, scheduler=None):
    """A new pipeline, every weight of it random: some are ones or zeros by default, and would not show a mix-up."""
    pipe = _SMALL[kind].build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in networks(pipe).values():
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    pipe.scheduler = scheduler or sd_scheduler()
    return pipe


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def says(pipe):
    return pipe.scheduler.config["prediction_type"], pipe.scheduler.config["rescale_betas_zero_snr"]


def networks(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def assert_same_weights(pipe, other):
    for name, part in networks(pipe).items():
        weights, others = part.state_dict(), getattr(other, name).state_dict()
        assert list(weights) == list(others)
        for key, tensor in weights.items():
            assert torch.equal(tensor, others[key]), (name, key)


@cache
def checkpoint(kind):
    """The weights of `tiny_pipeline` in the original layout; do not change them."""
    return original_checkpoint(tiny_pipeline(kind))


def write_file(path, kind, keys=(), metadata=None):
    """A checkpoint with empty tensors of these names, and this metadata."""
    save_file(checkpoint(kind) | {key: torch.empty(0) for key in keys}, path, metadata)
    return path


def paint(pipe, n=3, **changes):
    call = {"num_inference_steps": n, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a dark landscape", generator=generator, **{**call, **changes}).images

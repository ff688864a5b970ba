"""The smallest diffusers pipelines that run, and networks whose terminal behaviour is known."""

from types import SimpleNamespace

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from published_models import published_pipeline, shallow_unet
from small_stable_diffusion import flawed_scheduler


def zero_snr_scheduler(prediction_type="v_prediction", zero=True):
    return DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without it, Stable Diffusion pipelines warn
        set_alpha_to_one=True,
    )


def tiny_unet(**changes):
    """Of pixels, 8 x 8, with weights from seed 0."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**config, **changes}).eval()


def tiny_unconditional(prediction_type="v_prediction"):
    return DDIMPipeline(tiny_unet(), zero_snr_scheduler(prediction_type))


def tiny_stable_diffusion(scheduler=None) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with few weights, from seed 0, for images of 64 x 64, on a zero-SNR schedule by default."""
    pipe = published_pipeline("1.5")
    pipe.scheduler = scheduler or zero_snr_scheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_stable_diffusion_xl(**changes) -> StableDiffusionXLPipeline:
    """SDXL with few weights, from seed 0, for images of 64 x 64, on the flawed schedule; `changes` of its config."""
    pipe = published_pipeline("xl")
    pipe.scheduler = flawed_scheduler()
    pipe.register_to_config(**changes)
    return pipe


IMAGE = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
RIGHT_HALF = (torch.arange(64) >= 32).float().expand(1, 1, 64, 64)


def tiny_generation(kind):
    """A stock pipeline by what it makes images from, and a function (n, **changes) that calls it for n steps.

    The function returns latents, or pixels for `unconditional`, made with a generator of seed 0. The network has few
    layers: what is looked at is what a pipeline asks of its scheduler.
    """
    call = {"output_type": "latent", "prompt": "a dark landscape", "guidance_scale": 2.0}
    if kind == "unconditional":
        pipe = DDPMPipeline(tiny_unconditional().unet, flawed_scheduler())
        call = {"output_type": "np"}  # older diffusers give arrays for "pt" too
    elif kind.startswith("xl"):
        pipe = tiny_stable_diffusion_xl()
        call |= {"guidance_scale": 1.0}
    else:
        pipe = tiny_stable_diffusion(flawed_scheduler())
    if kind != "unconditional":
        pipe.unet = shallow_unet(pipe.unet.config)
    if kind == "inpaint":
        pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
        call |= {"image": IMAGE, "mask_image": RIGHT_HALF, "height": 64, "width": 64}
    elif kind == "image":
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        call |= {"image": IMAGE, "strength": 1.0}
    elif kind == "xl-image":
        pipe = StableDiffusionXLImg2ImgPipeline(
            **pipe.components, requires_aesthetics_score=False, add_watermarker=False
        )
        call |= {"image": IMAGE, "strength": 1.0}
    pipe.set_progress_bar_config(disable=True)

    def generate(n, **changes):
        return torch.as_tensor(pipe(num_inference_steps=n, **{**call, "generator": seeded(), **changes}).images)

    return pipe, generate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watch(unet):
    """The timesteps that the network is called at, as it is called."""
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    return seen


class StubUNet(torch.nn.Module):
    """A denoiser given by a function of (x_t, condition); counts its calls and the sizes of their batches."""

    def __init__(self, function, channels=3, out_channels=None, size=8):
        super().__init__()
        self.function = function
        self.config = SimpleNamespace(
            in_channels=channels,
            out_channels=out_channels or channels,
            sample_size=size,
            num_class_embeds=None,
            addition_embed_type=None,
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.batches, self.timesteps = [], []

    def forward(self, x_t, timestep, **condition):
        self.batches.append(len(x_t))
        self.timesteps.append(int(timestep))
        return SimpleNamespace(sample=self.function(x_t, **condition))


class StubPipeline:
    """Holds a denoiser and a scheduler; has no text."""

    def __init__(self, function, scheduler=None, **kwargs):
        self.unet = StubUNet(function, **kwargs)
        self.scheduler = scheduler or zero_snr_scheduler()


class StubTextPipeline(StubPipeline):
    """The "embedding" of a prompt is its length."""

    def encode_prompt(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance):
        assert num_images_per_prompt == 1
        assert do_classifier_free_guidance is False
        return torch.full((1, 1, 1), float(len(prompt)), device=device), None

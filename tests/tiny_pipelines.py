"""The smallest diffusers pipelines that run, and networks whose terminal behaviour is known."""

from types import SimpleNamespace

import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline, UNet2DModel
from landscapes import captions
from small_stable_diffusion import build_stable_diffusion


def zero_snr_scheduler(prediction_type="v_prediction", zero=True):
    return DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without it, Stable Diffusion pipelines warn
        set_alpha_to_one=True,
    )


def tiny_unconditional(prediction_type="v_prediction"):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet, zero_snr_scheduler(prediction_type))


def tiny_stable_diffusion(scheduler=None) -> StableDiffusionPipeline:
    """With weights from seed 0, for pictures of 16 x 16, on a zero-SNR schedule unless told otherwise."""
    pipe = build_stable_diffusion(
        image_size=16,
        unet_channels=(8, 16),
        vae_channels=(8, 8, 8),
        text_width=8,
        texts=[*captions(), "a cat", "snow"],
    )
    pipe.scheduler = scheduler or zero_snr_scheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


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

"""The smallest diffusers pipelines that run, and networks whose terminal behaviour is known."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("black", "cat", "snow", "white")


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


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = sorted(set("".join(WORDS)))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:  # each word grows letter by letter to one token: "b l", "bl a", ...
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges.append("".join(pieces[:i]) + " " + pieces[i])
            tokens.append("".join(pieces[: i + 1]))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """With weights from seed 0; `folder` takes the tokenizer's files."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    tokenizer = tiny_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=zero_snr_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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

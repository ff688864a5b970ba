"""`StableDiffusionPAGInpaintPipeline` with `guidance_rescale` uses a variable that its PAG branch never sets."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPAGInpaintPipeline, UNet2DConditionModel

unet = UNet2DConditionModel(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=2,
)
vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
pipe = StableDiffusionPAGInpaintPipeline(vae, None, None, unet, scheduler, None, None, None, False, "down")
pipe.set_progress_bar_config(disable=True)
prompts = {"prompt_embeds": torch.zeros(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
image, mask = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
pipe(**prompts, image=image, mask_image=mask, height=8, width=8, num_inference_steps=2, guidance_rescale=0.7)

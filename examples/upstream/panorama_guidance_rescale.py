"""`StableDiffusionPanoramaPipeline` accepts `guidance_rescale` and ignores it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPanoramaPipeline, UNet2DConditionModel

torch.manual_seed(0)
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
pipe = StableDiffusionPanoramaPipeline(
    AutoencoderKL(), None, None, unet, DDIMScheduler(steps_offset=1, clip_sample=False), None, None, None, False
)
pipe.set_progress_bar_config(disable=True)
prompts = {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
images = [
    pipe(**prompts, **size, guidance_rescale=strength, generator=torch.Generator().manual_seed(0)).images
    for strength in (0.0, 0.7)
]
print("difference that guidance_rescale=0.7 makes:", (images[0] - images[1]).abs().max().item())
assert not torch.equal(images[0], images[1])

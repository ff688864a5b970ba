"""`add_noise` computes in the dtype of the sample: it loses all noise near the end in float16, some in bfloat16.

Image-to-image at strength 1 in float16 then starts from zeros.
"""

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

zero, noise = torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
found = {}
for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
    scheduler = cls(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(1000)
    noisy = scheduler.add_noise(zero.half(), noise.half(), torch.tensor([999]))
    found[f"{cls.__name__}, float16, t = 999"] = noisy.float().std().item()
noisy = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).add_noise(
    zero.bfloat16(), noise.bfloat16(), torch.tensor([0])
)
found["DDIMScheduler, bfloat16, t = 0"] = noisy.float().std().item()
print(*(f"{name}: std of the noise {value:.3f}" for name, value in found.items()), sep="\n")
assert min(found.values()) > 0

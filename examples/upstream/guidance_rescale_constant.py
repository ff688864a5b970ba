"""`guidance_rescale` divides by the standard deviation of the guided prediction, which may be 0: the image is NaN.

At zero SNR the ideal v-prediction in the first step is minus the mean of the data, a constant for data of flat colors.
"""

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

constant = torch.full((1, 4, 8, 8), -0.5)
rescaled = rescale_noise_cfg(constant * 1.5, constant, guidance_rescale=0.7)
print("NaN:", rescaled.isnan().all().item())
assert rescaled.isfinite().all()

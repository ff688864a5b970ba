"""`DDIMScheduler.step` goes to t - T // n, which is not its own next timestep unless n divides T.

The data is N(0, 10^2) and the prediction exact, so the sample should grow to ten times the noise that it started from.
"""

import torch
from diffusers import DDIMScheduler

ratios = {}
for n in (10, 28, 60, 100, 128, 501, 1000):
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False
    )
    scheduler.set_timesteps(n)
    sample = torch.ones(1, 1, 1, 1)
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        x_0 = 100 * alpha / (100 * alpha**2 + sigma**2) * sample  # E[x_0 | x_t]
        sample = scheduler.step(alpha * (sample - alpha * x_0) / sigma - sigma * x_0, t, sample).prev_sample
    ratios[n] = sample.item() / 10
print("size relative to the data:", {n: round(ratio, 2) for n, ratio in ratios.items()})
assert sorted(ratios.values()) == list(ratios.values())

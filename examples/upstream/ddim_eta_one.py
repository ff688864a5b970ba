"""`DDIMScheduler` with eta = 1 on a zero-SNR schedule is NaN: rounding makes a variance negative under the root."""

import torch
from diffusers import DDIMScheduler

scheduler = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    prediction_type="v_prediction",
)
sample, nan = torch.ones(1, 1, 2, 2), []
for n in range(1, 1001):
    scheduler.set_timesteps(n)
    if scheduler.step(-sample, scheduler.timesteps[0], sample, eta=1.0).prev_sample.isnan().any():
        nan.append(n)
print(f"first step NaN at {len(nan)} of 1000 step counts, among them", *nan[:8])
assert not nan

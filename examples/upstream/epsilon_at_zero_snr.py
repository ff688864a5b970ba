"""An epsilon model on a zero-SNR schedule divides by sqrt(alpha_bar) = 0, and nothing says so.

No x_0 follows from epsilon there; an error when the scheduler is made would save users images of noise.
"""

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

torch.manual_seed(0)
sample, results = torch.randn(1, 4, 8, 8), {}
for cls, options in ((DDIMScheduler, {"clip_sample": False}), (EulerDiscreteScheduler, {})):
    scheduler = cls(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="epsilon", **options)
    scheduler.set_timesteps(20)
    x_t = sample * scheduler.init_noise_sigma
    output = scheduler.scale_model_input(x_t, scheduler.timesteps[0]) * 1.01  # epsilon, wrong by 1 %
    x_0 = scheduler.step(output, scheduler.timesteps[0], x_t).pred_original_sample
    results[cls.__name__] = round(x_0.abs().mean().item(), 1)
print("mean |x_0| after an output that is wrong by 1 %:", results)
assert all(value < 10 for value in results.values())

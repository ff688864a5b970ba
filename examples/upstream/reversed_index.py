"""Before `set_timesteps`, `add_noise` and `get_velocity` look timesteps up in a table that runs the other way.

Training calls them so: t = 999 gets the noise of t = 0.
"""

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

sample, noise, t = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([999])
amounts = {
    cls.__name__: round(cls().add_noise(sample, noise, t).item(), 4)
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
}
print("sigma at t = 999:", amounts)
assert max(amounts.values()) - min(amounts.values()) < 1e-3

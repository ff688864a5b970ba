"""`timestep_spacing="trailing"` returns one timestep too many, -1, for some step counts."""

from diffusers import DDIMScheduler

scheduler = DDIMScheduler(timestep_spacing="trailing")
wrong = {}
for n in range(1, 1001):
    scheduler.set_timesteps(n)
    if len(scheduler.timesteps) != n or scheduler.timesteps.min() < 0:
        wrong[n] = (len(scheduler.timesteps), scheduler.timesteps[-1].item())
print(f"{len(wrong)} of 1000 step counts, among them", *list(wrong)[:8])
print("set_timesteps(61): count and last timestep", wrong.get(61))
assert not wrong

"""At zero SNR, Karras, exponential and beta sigmas start at 4096 instead of infinity, and most steps stay there.

14.6 is the highest sigma of the same schedule before it is rescaled.
"""

from diffusers import DPMSolverMultistepScheduler

spent = {}
for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        **{flag: True},
    )
    scheduler.set_timesteps(20)
    spent[flag] = int((scheduler.sigmas > 14.6).sum())
print("steps of 20 above sigma 14.6:", spent)
assert max(spent.values()) < 5

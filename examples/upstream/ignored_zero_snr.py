"""Schedulers without `rescale_betas_zero_snr` keep the flag in their config and ignore it, without a warning.

Such a pipeline samples a zero-SNR model on a schedule that it was not trained on.
"""

import diffusers

names = ["DEISMultistep", "DPMSolverSinglestep", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver"]
config = diffusers.DDIMScheduler(
    rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
).config
ignoring = []
for name in names:
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    if scheduler.config.rescale_betas_zero_snr and scheduler.alphas_cumprod[-1] > 1e-6:
        ignoring.append(name)
print("config.rescale_betas_zero_snr is True, the SNR is not zero:", *ignoring)
assert not ignoring

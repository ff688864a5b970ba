"""Min-SNR-gamma as in `train_text_to_image.py --snr_gamma 5` is 0 for v and NaN for epsilon at zero SNR."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

snr = compute_snr(DDPMScheduler(rescale_betas_zero_snr=True), torch.tensor([999]))
clipped = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0]  # as the script does
weights = {"v_prediction": (clipped / (snr + 1)).item(), "epsilon": (clipped / snr).item()}
print("loss weight at T - 1:", weights)
assert all(weight > 0 for weight in weights.values())

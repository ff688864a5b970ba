"""`python -m zsnr_diffusers.training` and `accelerate launch -m zsnr_diffusers.training`."""

from .cli import main

main()

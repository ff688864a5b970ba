"""`python -m zsnr_diffusers.training.pixels` and `accelerate launch -m zsnr_diffusers.training.pixels`."""

from ..cli import main
from .config import PixelTrainingConfig

main(kind=PixelTrainingConfig)

"""`python -m zsnr_diffusers`, the same as `zsnr`."""

import sys

from .cli import main

sys.exit(main())

"""`python -m zsnr_diffusers.cli`, the same as `zsnr`."""

import sys

from . import main

sys.exit(main())

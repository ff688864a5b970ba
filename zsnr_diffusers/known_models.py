"""What is known of some models of the Hub, whose files do not all say it: the last that is asked."""

import os
from pathlib import Path
from typing import Any

_KNOWN = {
    **dict.fromkeys(
        (
            "CompVis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "stabilityai/stable-diffusion-2-base",
            "stabilityai/stable-diffusion-2-1-base",
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ("epsilon", False),
    ),
    **dict.fromkeys(("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-1"), ("v_prediction", False)),
    **dict.fromkeys(
        (
            "ByteDance/sd2.1-base-zsnr-laionaes5",  # of Lin et al. 2023
            "ByteDance/sd2.1-base-zsnr-laionaes6",
            "drhead/ZeroDiffusion",
            "Laxhar/noobai-XL-Vpred-1.0",
        ),
        ("v_prediction", True),
    ),
}
"""What a model predicts, and whether it was trained to zero terminal SNR, by its authors' word."""


def known_model(repo: str | None) -> tuple[str | None, bool | None]:
    """Prediction type, and whether at zero terminal SNR; None where nothing is known here."""
    return _KNOWN.get(repo or "", (None, None))


def repo_of(source: Any) -> str | None:
    """The Hub id that a source is, or that a file in the Hub's cache is of; None if it is of no repo."""
    path = Path(os.fspath(source))
    if not path.exists():
        return str(source)
    of_the_cache = (part for part in path.absolute().parts if part.startswith("models--"))
    return next((part.removeprefix("models--").replace("--", "/") for part in of_the_cache), None)

"""What is known about some Hub models whose files do not record it; consulted last."""

import os
from pathlib import Path
from typing import Any

_SD_2 = {
    **dict.fromkeys(("stable-diffusion-2-base", "stable-diffusion-2-1-base"), ("epsilon", False)),
    **dict.fromkeys(("stable-diffusion-2", "stable-diffusion-2-1"), ("v_prediction", False)),
    "stable-diffusion-2-inpainting": ("epsilon", False),
}
"""Models that Stability AI removed from the Hub in November 2025; sd2-community has copies."""

_KNOWN = {
    **dict.fromkeys(
        (
            "CompVis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-inpainting",
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ("epsilon", False),
    ),
    **{f"{owner}/{name}": facts for owner in ("stabilityai", "sd2-community") for name, facts in _SD_2.items()},
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
"""Prediction type of a model, and whether it was trained at zero terminal SNR, as stated by its authors."""


_MOVED = {
    **{f"stabilityai/{name}": f"sd2-community/{name}" for name in _SD_2},
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


def find_repo_copy(repo: str) -> str | None:
    """Hub id of a copy of a repo that was removed from the Hub; None for other repos."""
    return _MOVED.get(repo)


def known_model_settings(repo: str | None) -> tuple[str | None, bool | None]:
    """(prediction type, whether at zero terminal SNR) of a known Hub repo; None where unknown."""
    return _KNOWN.get(repo or "", (None, None))


def repo_id_of(source: Any) -> str | None:
    """Hub id of a source: itself, or the repo of a cached file; None for other local paths."""
    path = Path(os.fspath(source))
    if not path.exists():
        return str(source)
    of_the_cache = (part for part in path.absolute().parts if part.startswith("models--"))
    return next((part.removeprefix("models--").replace("--", "/") for part in of_the_cache), None)

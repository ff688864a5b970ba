"""The newest versions that the tests have passed on. Nothing keeps newer ones from being installed."""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from diffusers.utils import logging
from packaging.version import Version

logger = logging.get_logger(__name__)

TESTED: Mapping[str, str] = {
    "torch": "2.14",
    "diffusers": "0.42",
    "transformers": "5.24",
    "accelerate": "1.15",
    "datasets": "5.2",
    "peft": "0.21",
}


def untested(tested: Mapping[str, str] = TESTED) -> dict[str, str]:
    """The installed versions, by package, whose major or minor number is higher than what was tested."""
    found = {}
    for package, newest in tested.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if Version(installed).release[:2] > Version(newest).release[:2]:
            found[package] = installed
    return found


def warn_of_untested() -> None:
    """Name them in one warning, in the first process of several; called where the package is imported, so once."""
    if (found := untested()) and os.environ.get("RANK", "0") == "0":
        names = ", ".join(
            f"{package} {installed} (tested up to {TESTED[package]})" for package, installed in found.items()
        )
        logger.warning(f"zsnr_diffusers has not been tested with {names}. If something fails, try the tested version.")

"""The newest versions with which the tests passed. Newer versions can still be installed."""

import logging
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)

TESTED: Mapping[str, str] = {
    "torch": "2.14",
    "diffusers": "0.42",
    "transformers": "5.24",
    "accelerate": "1.15",
    "datasets": "5.2",
    "peft": "0.21",
}


def untested_versions(tested: Mapping[str, str] = TESTED) -> dict[str, str]:
    """Installed versions, by package, with a higher major or minor number than tested."""
    found = {}
    for package, newest in tested.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if Version(installed).release[:2] > Version(newest).release[:2]:
            found[package] = installed
    return found


def warn_of_untested_versions() -> None:
    """Log one warning that names untested versions, in the main process; called when the package is imported."""
    if (found := untested_versions()) and os.environ.get("RANK", "0") == "0":
        names = ", ".join(
            f"{package} {installed} (tested up to {TESTED[package]})" for package, installed in found.items()
        )
        logger.warning(f"zsnr_diffusers has not been tested with {names}. If something fails, try the tested version.")

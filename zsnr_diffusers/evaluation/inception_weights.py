"""Download the file of the 2015 Inception network once."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

from .features import INCEPTION_SHA256

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"  # 95 MB
)


def inception_file(url: str = INCEPTION_URL, sha256: str = INCEPTION_SHA256) -> Path:
    """The path of `inception-2015-12-05.pt` in torch hub's cache, downloaded if missing.

    An existing file is not checked here; `InceptionFeatures` checks its hash.

    Raises:
        OSError: the download failed; the message says where to put the file manually.
        ValueError: the downloaded file has another hash and was deleted.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}", file=sys.stderr)
    try:
        # Partial files have another name, so an existing file is complete.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise ValueError(
            f"{url}: {error}; the file was deleted. Try again, or put the correct file at {path}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        remedy = f"put the file at {path}, or pass its path (--feature_weights)"
        raise OSError(f"{url} cannot be downloaded ({error}); {remedy}") from error
    return path

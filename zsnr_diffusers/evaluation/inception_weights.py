"""The file of the 2015 Inception network, fetched once."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

from .features import INCEPTION_SHA256

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"  # 95 MB
)


def inception_file(url: str = INCEPTION_URL, sha256: str = INCEPTION_SHA256) -> Path:
    """The path of `inception-2015-12-05.pt` in torch hub's cache, where it is put if it is not there.

    A file that is there is taken as it is; `InceptionFeatures` checks its hash.

    Raises:
        OSError: it cannot be fetched; the message says where to put it by hand.
        ValueError: what was fetched has another hash; nothing is kept.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}", file=sys.stderr)
    try:
        # A partial file has another name; this one is there only once it is whole.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise ValueError(f"{url}: {error}; it was not kept. Try again, or put the right file at {path}") from error
    except (OSError, http.client.HTTPException) as error:
        remedy = f"put the file at {path}, or pass its path (--feature_weights)"
        raise OSError(f"{url} cannot be fetched ({error}); {remedy}") from error
    return path

import pytest
from tar_shards import FlakyFileSystem

from zsnr_diffusers.training.data import remote


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each read of a `flaky://` file, which is not waited for where it fails."""
    monkeypatch.setattr(remote, "RETRY_DELAYS", ())
    monkeypatch.setattr(FlakyFileSystem, "errors", [])
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    return FlakyFileSystem.reads

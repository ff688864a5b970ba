"""Which format the files of `--train_shards` have, and the indices of all of them."""

from ...utils.distributed import Processes
from ..config import DataConfig
from .remote import resolve_urls
from .shards import Shards
from .tar_shards import TarShards


def create_shards(config: DataConfig) -> Shards:
    """The shards that a configuration names, not open yet.

    Raises:
        ShardError: there are none.
        ValueError: options do not fit the format.
    """
    return TarShards(config, resolve_urls(str(config.train_shards)))


def index_shards(config: DataConfig, processes: Processes) -> None:
    """Build and save the indices of all shards, each process for a share of the files.

    Raises:
        ShardError, OSError, ValueError: as `create_shards` and `Shards.open`.
        ProcessError: another process failed.
    """
    if not config.train_shards:
        return
    with processes.sync_errors():
        shards = create_shards(config)
        if shards.folder is not None:
            shards.scan(processes.split(shards.urls))

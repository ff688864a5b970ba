"""Which format the files of `--train_shards` have, and the indices of all of them."""

from ...utils.distributed import Processes
from ..config import DataConfig
from .parquet_shards import ParquetShards
from .remote import ShardError, resolve_urls
from .shards import Shards
from .tar_shards import TarShards


def create_shards(config: DataConfig) -> Shards:
    """The shards that a configuration names, by the ending of their files; not open yet.

    Raises:
        ShardError: there are none, or files of both formats.
        ValueError: options do not fit the format.
    """
    urls = resolve_urls(str(config.train_shards))
    parquet = [url for url in urls if _is_parquet(url)]
    others = [url for url in urls if not _is_parquet(url)]
    if parquet and others:
        raise ShardError(
            f"{config.train_shards}: {len(parquet)} files are parquet, such as {parquet[0]}, and {len(others)} are "
            f"not, such as {others[0]}; use files of one format."
        )
    return ParquetShards(config, parquet) if parquet else TarShards(config, others)


def _is_parquet(url: str) -> bool:
    """Whether a file is parquet, by its ending."""
    return url.lower().endswith(".parquet")


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

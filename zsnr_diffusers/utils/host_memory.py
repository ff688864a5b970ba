"""Available host memory."""

from pathlib import Path

from .extras import import_extra

_CGROUP = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Bytes available on this machine, or within the limit of the process's container."""
    free = int(import_extra("psutil", "train").virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, another operating system, or "max"
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)))  # the page cache counts, but is reclaimable

"""Threads in the place of processes: all of `LaunchedProcesses` but the network between them."""

import threading
from concurrent.futures import ThreadPoolExecutor

from zsnr_diffusers.utils.distributed import LaunchedProcesses


class ThreadProcesses(LaunchedProcesses):
    def __init__(self, rank, size, barrier, values):
        self.rank, self.size, self.device, self._barrier, self._values = rank, size, None, barrier, values

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()  # nobody writes before all have read
        return values

    def broadcast(self, value):
        return self.gather(value)[0]


def in_threads(size, function):
    """What `function(processes)` returns or raises in each of `size` processes; one left waiting is an error."""
    barrier, values = threading.Barrier(size, timeout=60), [None] * size

    def run(rank):
        try:
            return function(ThreadProcesses(rank, size, barrier, values))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))

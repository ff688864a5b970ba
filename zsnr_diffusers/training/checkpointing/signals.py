"""Handle SIGTERM and SIGINT as a request to stop after the current step."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_ECHO_SECONDS = 1.0
"""A cluster signals all processes of a job, and a launcher forwards its signal: both are one request."""


class StopSignals:
    """Inside this context, the first signal is recorded and the second ends the process immediately.

    Signals can only be handled in the main thread; in another one, nothing changes.

    Args:
        verbose: whether this process prints received signals.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.received = 0
        """Number of the signal, 0 before there is one."""
        self._verbose = verbose
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None means a handler that was not set in Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; end the process at the second, unless it is an echo of the first."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if self._verbose:
                name = signal.Signals(number).name
                # Not print, which is not reentrant.
                os.write(
                    2,
                    f"\n{name}: stopping after this step, with a checkpoint; signal again to stop "
                    "immediately\n".encode(),
                )
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore SIGTERM and SIGINT in a DataLoader worker, since the training process decides when to stop."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

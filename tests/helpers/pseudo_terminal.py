"""A terminal for tests: what a person would see there, with or without the codes of colours."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading

BOX = "─"
"""Of the line under the head of a table."""

ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": None, "NO_COLOR": None, "FORCE_COLOR": None, "COLORTERM": None}
"""What decides how a terminal is drawn on; None: unset."""


class Screen:
    """What was written, once the terminal is closed."""

    def __init__(self):
        self.written = b""

    @property
    def raw(self):
        return self.written.decode().replace("\r\n", "\n")

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", self.raw)

    @property
    def lines(self):
        return [line.rstrip() for line in self.text.splitlines()]


@contextlib.contextmanager
def terminal(columns):
    """A pseudo-terminal of that width: its file descriptor, and the screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    screen = Screen()
    reader = threading.Thread(target=_read, args=(ours, screen))
    reader.start()
    try:
        yield theirs, screen
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)


def _read(descriptor, screen):
    with contextlib.suppress(OSError):  # Linux ends the file of a closed terminal so
        while part := os.read(descriptor, 4096):
            screen.written += part


def on_terminal(monkeypatch, columns, call, encoding="utf-8", **environment):
    """What a call prints on a terminal; the call is in this process, which has another terminal or none."""
    for name, value in {**ENVIRONMENT, "COLUMNS": str(columns), **environment}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with (
        terminal(columns) as (descriptor, screen),
        open(descriptor, "w", encoding=encoding, closefd=False) as stdout,
        monkeypatch.context() as patched,
    ):
        patched.setattr("sys.stdout", stdout)
        call()
    return screen

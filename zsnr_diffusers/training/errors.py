"""Exceptions that stop training before its last step."""


class TrainingError(RuntimeError):
    """Training had to stop; the message says at which step, why, and what is kept."""


class TrainingInterrupted(SystemExit):
    """A signal stopped training, after a checkpoint; if not caught, the program exits with the usual status.

    Args:
        signal_number: of the signal; `code` is 128 more.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)

"""Why training ended before its last step."""


class TrainingError(RuntimeError):
    """Training had to stop; the message says at which step, why, and what is kept."""


class TrainingInterrupted(SystemExit):
    """A signal stopped training, after a checkpoint; a program that lets it pass exits as shells expect.

    Args:
        signal_number: of the signal; `code` is 128 more.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)

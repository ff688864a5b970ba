"""Calls of `zsnr evaluate` inside the test's own process."""

from PIL import Image

from zsnr_diffusers.cli import main


def fill(folder, greys):
    folder.mkdir()
    for i, grey in enumerate(greys):
        Image.new("L", (2, 2), grey).save(folder / f"{i}.png")
    return folder


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def refused(capsys, *arguments):
    """The error message of a call that is refused in one line."""
    assert evaluate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.splitlines()[-1]  # after the progress bars
    assert message.startswith("zsnr evaluate: error: ")
    return message

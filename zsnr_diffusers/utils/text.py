"""Text formatting for messages."""

from collections.abc import Sequence


def abbreviate(items: Sequence[object], most: int) -> str:
    """The first `most` of many items, separated by commas, and the number of the remaining ones."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more

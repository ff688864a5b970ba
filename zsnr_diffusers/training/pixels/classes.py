"""The classes of a dataset: the class of each row, and the classes' names."""

from dataclasses import dataclass

import datasets


@dataclass(frozen=True)
class Classes:
    """Class of each row, 0 to N - 1, and the classes' names, None if the data has only numbers."""

    labels: list[int]
    names: list[str] | None
    count: int

    def name(self, label: int) -> str:
        """A class's name, or its number if the data has no names."""
        return str(label) if self.names is None else self.names[label]


def read_classes(rows: datasets.Dataset, column: str, count: int | None = None) -> Classes:
    """Read the classes of data rows: `ClassLabel`s, numbers from 0, or words, which are sorted.

    Args:
        rows: of the dataset.
        column: of the classes.
        count: N of a network to continue training; None uses the data's number of classes.

    Raises:
        ValueError: a row without class, numbers out of range, classes of a different type, or a different number than
            the network has.
    """
    values, feature = list(rows[column]), rows.features[column]
    if None in values:
        raise ValueError(f"--class_column={column}: row {values.index(None)} has no class.")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(
            f"--class_column={column} holds {type(values[0]).__name__}, row 0 {values[0]!r}; classes must be words, "
            "or numbers starting from 0."
        )
    if names is not None and count not in (None, len(names)):
        raise ValueError(
            f"The data has {len(names)} classes, the network has {count}: use data with the same classes, or a new "
            "network."
        )
    count = count or (max(values) + 1 if names is None else len(names))
    for row, value in enumerate(values):
        if not 0 <= value < count:
            raise ValueError(
                f"--class_column={column}: row {row} has class {value}; classes must be from 0 to {max(count - 1, 0)}."
            )
    return Classes(values, names, count)

"""Parquet files for tests, with as many rows in each row group as they are told."""

import datasets
import pyarrow
import pyarrow.parquet


def table(samples, **columns):
    """A table of (name, bytes of an image, caption), as `datasets` writes images, and more columns."""
    images = [{"bytes": image, "path": f"{key}.png"} for key, image, _ in samples]
    return pyarrow.table({"image": images, "text": [text for _, _, text in samples], **columns})


def write(file, content, groups):
    """Write a table in row groups of so many rows each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    at = 0
    with pyarrow.parquet.ParquetWriter(file, content.schema) as writer:
        for rows in groups:
            writer.write_table(content.slice(at, rows), row_group_size=max(rows, 1))
            at += rows
    return str(file)


def write_parquet(folder, samples, groups=((4, 3), (3,))):
    """A file for each tuple of row groups, `0.parquet` and so on; the pattern that names them."""
    rest = iter(samples)
    for number, sizes in enumerate(groups):
        write(folder / f"{number}.parquet", table([next(rest) for _ in range(sum(sizes))]), sizes)
    return f"{folder}/{{0..{len(groups) - 1}}}.parquet"


def write_by_datasets(file, samples):
    """A file as `datasets` uploads them: the images' type and their names are among its metadata."""
    columns = {"image": [{"bytes": image, "path": f"{key}.png"} for key, image, _ in samples]}
    columns["text"] = [text for _, _, text in samples]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    return str(file)

"""What a start costs before the first step: time and memory to find, check and order the data.

    python examples/benchmarks/data_start.py --layout folder --rows 100000
    python examples/benchmarks/data_start.py --layout parquet --rows 1000000
    python examples/benchmarks/data_start.py --layout tar --rows 1000000

Rows are generated: images of 8 x 8 pixels, so of real data the bytes are missing. A first start reads every byte, and
how long that takes is the disk's and the decoder's matter; a later one opens no image, and takes as long with large
ones. Each start is a process of its own, of which seconds and peak memory are printed.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

PER_SHARD = 10_000
"""Rows of a tar, or of a row group."""


def runs(rows: int) -> Iterator[range]:
    """Numbers of the rows of each shard."""
    return (range(first, min(first + PER_SHARD, rows)) for first in range(0, rows, PER_SHARD))


def image_bytes(number: int) -> bytes:
    """A small JPEG, with bytes that no other has."""
    pixels = np.random.default_rng(number % 64).integers(256, size=(8, 8 + number % 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment=str(number).encode())
    return buffer.getvalue()


def make_folder(folder: Path, rows: int) -> None:
    """Images in folders of a thousand, with their captions in metadata."""
    for first in range(0, rows, 1000):
        part = folder / f"{first // 1000:05d}"
        part.mkdir(parents=True)
        lines = []
        for number in range(first, min(first + 1000, rows)):
            (part / f"{number:07d}.jpg").write_bytes(image_bytes(number))
            lines.append(json.dumps({"file_name": f"{number:07d}.jpg", "text": f"image {number}"}))
        (part / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_parquet(folder: Path, rows: int) -> None:
    """One file of many row groups."""
    schema = pyarrow.schema([("image", pyarrow.binary()), ("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for numbers in runs(rows):
            columns = [[image_bytes(number) for number in numbers], [f"image {number}" for number in numbers]]
            writer.write_table(pyarrow.table(columns, schema=schema))


def make_tars(folder: Path, rows: int) -> None:
    """Shards in WebDataset's layout."""
    for place, numbers in enumerate(runs(rows)):
        with tarfile.open(folder / f"{place:05d}.tar", "w") as tar:
            for number in numbers:
                for name, data in ((f"{number:07d}.jpg", image_bytes(number)), (f"{number:07d}.txt", b"image")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def start(layout: str, data: Path, output: Path, rehash: bool) -> None:
    """What a run does with its data before it trains, in this process."""
    from zsnr_diffusers.training import TrainingConfig
    from zsnr_diffusers.training.data.dataset import check_images, hash_images, open_file_index, open_rows
    from zsnr_diffusers.training.data.row_values import ImageSizes
    from zsnr_diffusers.training.stable_diffusion.conditioning import Conditioning
    from zsnr_diffusers.training.stable_diffusion.samples import CaptionedDataset

    places = {"folder": {"train_data_dir": str(data)}, "parquet": {"train_shards": f"{data}/*.parquet"}}
    where = places.get(layout, {"train_shards": f"{data}/*.tar"})
    config = TrainingConfig(
        pretrained_model_name_or_path="none",
        output_dir=str(output),
        rehash=rehash,
        aspect_ratio_buckets=layout == "folder",
        **where,
    )
    seconds = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 2), now

    rows = open_rows(config)
    lap("open")
    images = check_images(rows, config, progress=False, index=open_file_index(config))
    lap("check")
    sizes = [(512, 512), (448, 576), (576, 448)]
    samples = CaptionedDataset(rows, images, config, Conditioning([]), sizes, (4, 8), 1000, 64)
    lap("buckets")
    if isinstance(images, ImageSizes):
        samples.hashes = hash_images(rows, "image", samples.rows_seen(len(rows)), open_file_index(config))
        lap("hash")
    shown = {samples.row_at(position) for position in range(0, samples.epoch_length, 1000)}
    assert len(shown) > 1
    lap("order")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"rows": len(rows), "seconds": seconds, "total": sum(seconds.values()), "peak_MB": round(peak)}))


def main() -> None:
    """Generate rows, and start twice and once with `--rehash`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=("folder", "parquet", "tar"), default="folder")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        data, output, rehash = args.child
        start(args.layout, Path(data), Path(output), rehash == "True")
        return
    with tempfile.TemporaryDirectory() as room:
        data, output = Path(room, "data"), Path(room, "run")
        data.mkdir()
        {"folder": make_folder, "parquet": make_parquet, "tar": make_tars}[args.layout](data, args.rows)
        for name, rehash in (("first start", False), ("later start", False), ("--rehash", True)):
            child = ["--layout", args.layout, "--child", str(data), str(output), str(rehash)]
            done = subprocess.run([sys.executable, __file__, *child], check=True, capture_output=True, text=True)
            print(f"{name}: {done.stdout.splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()

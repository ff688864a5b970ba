"""Measure images in one pass: luminance, and optionally features of a network.

At most one batch of images is in memory, and several processes can share the work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.distributed import Processes
from ..utils.extras import import_extra
from ..utils.images import ImageError
from ..utils.tables import Part, Report, Text
from ..utils.text import abbreviate
from .extraction import ImageFeatures, image_features
from .features import FeatureNetwork
from .generation import iter_images
from .image_stream import (
    ImageReader,
    NamedSize,
    OnBadImage,
    check_same_size,
    check_save_folder,
    image_file_name,
    list_images,
    record_thumbnails,
    save_each_image,
)
from .luminance import Floats, LuminanceSummary, clipped_share, mean_luminance
from .plots import sample_grid

GRID_ROWS, GRID_COLUMNS, GRID_CELL = 8, 8, 256
"""Maximum number of prompts and seeds in the grid of samples, and the side of its cells in pixels."""


@dataclass(frozen=True)
class Measurements(Report):
    """Measurements of n images, in their order.

    `luminance` and `clipped`, the fraction of values that are 0 or 255, are float64 [n]; `features` is None without a
    network or images; `skipped` lists unreadable files; `first` is the name and size of the first image.
    """

    luminance: Floats
    clipped: Floats
    features: ImageFeatures | None
    skipped: list[str]
    first: NamedSize | None

    def __repr__(self) -> str:
        network = "" if self.features is None else f", features of {self.features.origin.network}"
        return f"Measurements of {len(self.luminance)} images{network}"

    def parts(self) -> Iterator[Part]:
        """The distribution of luminance, the network of the features, and how many files were skipped."""
        if len(self.luminance):
            yield from LuminanceSummary.of(self.luminance).parts()
        if self.features is not None:
            yield Text(f"features: {self.features.origin}")
        if self.skipped:
            yield Text(f"skipped: {abbreviate(self.skipped, 3)}", "warning")

    @classmethod
    def concatenate(cls, parts: Sequence[Measurements]) -> Measurements:
        """Concatenate the measurements of several processes.

        Raises:
            ValueError: features of images of different sizes.
        """
        features = [part.features for part in parts if part.features is not None]
        first = [part.first for part in parts if part.first is not None]
        if features:
            for other in first:
                check_same_size(other, first[0])
        return cls(
            np.concatenate([part.luminance for part in parts]),
            np.concatenate([part.clipped for part in parts]),
            ImageFeatures.concatenate(features) if features else None,
            [name for part in parts for name in part.skipped],
            first[0] if first else None,
        )


def measure_images(
    images: Iterable[Image.Image | str | PathLike[str]],
    network: FeatureNetwork | None = None,
    *,
    on_bad_image: OnBadImage = "fail",
    progress: bool = True,
) -> Measurements:
    """Read every image once, and measure its luminance and, given a network, its features.

    Args:
        images: paths or PIL images, of equal size if there is a network.
        network: such as `InceptionFeatures`; None for luminance only.
        on_bad_image: "skip" skips unreadable files and names each on stderr.
        progress: show a progress bar on a terminal.

    Raises:
        ImageError: an unreadable file, with "fail".
        ValueError: images of different sizes.
    """
    values: list[tuple[float, float]] = []
    disable = None if progress else True  # None: only where the output is a terminal
    bar = import_extra("tqdm").tqdm(images, unit="image", disable=disable)
    reader = ImageReader(bar, on_bad_image, one_size=network is not None)
    noted = _record_luminance(reader, values)
    try:
        features = _extract_features(network, noted)
    except ImageError as error:
        raise ImageError(f"{error}; repair or remove it, or skip such images (--on_bad_image skip)") from error
    luminance, clipped = np.array(values, dtype=np.float64).reshape(-1, 2).T
    return Measurements(luminance, clipped, features, reader.skipped, reader.first)


def _record_luminance(images: Iterable[Image.Image], values: list[tuple[float, float]]) -> Iterator[Image.Image]:
    """Yield images, and append the mean luminance and clipped fraction of each to `values`."""
    for image in images:
        values.append((float(mean_luminance([image])[0]), clipped_share(image)))
        yield image


def _extract_features(network: FeatureNetwork | None, images: Iterator[Image.Image]) -> ImageFeatures | None:
    """Features of all images by the network; without one, images are only read, for the luminance."""
    if network is None:
        for _ in images:
            pass
        return None
    first = next(images, None)  # a process may have no images
    return None if first is None else image_features(network, chain([first], images), progress=False)


def measure_folder(
    folder: str | PathLike[str],
    network: FeatureNetwork | None = None,
    on_bad_image: OnBadImage = "fail",
    processes: Processes | None = None,
) -> Measurements:
    """Measure every image below a folder, at any depth, in the order of the paths.

    Args:
        folder: folder of images.
        network: as in `measure_images`.
        on_bad_image: "skip" skips unreadable images and reports them on stderr.
        processes: processes that share the work, from `launched_processes`; each returns the complete result.

    Raises:
        ImageError: an unreadable image, with "fail".
        ValueError: no images, no readable ones, or images of different sizes with a network.
        OSError: the folder does not exist or is a file.
    """
    processes = processes or Processes()
    with processes.sync_errors():
        paths = list_images(folder, on_bad_image)
        own = measure_images(processes.split(paths), network, on_bad_image=on_bad_image, progress=processes.is_main)
    measured = Measurements.concatenate(processes.gather(own))
    if measured.skipped and processes.is_main:
        print(f"skipped {len(measured.skipped)} of {len(paths)} images in {folder}", file=sys.stderr)
    if not len(measured.luminance):
        raise ValueError(f"none of the {len(paths)} images in folder {str(folder)!r} can be read")
    return measured


def measure_pipeline(
    pipe: Any,
    prompts: Sequence[Any] | None,
    num_images: int,
    seed: int = 0,
    network: FeatureNetwork | None = None,
    *,
    processes: Processes | None = None,
    save_images: str | PathLike[str] | None = None,
    grid: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[Measurements, list[Any]]:
    """Generate images and measure each as it would be saved, without keeping them in memory.

    Image i has prompt i mod P and seed `seed` + i div P, independent of the number of processes: all prompts use the
    same seeds, and images are spread evenly over them.

    Args:
        pipe: any pipeline that `iter_images` takes.
        prompts: distinct prompts or class labels; None for an unconditional pipeline.
        num_images: number of images in total.
        seed: of the first image of each prompt.
        network: as in `measure_images`.
        processes: processes that share the work, from `launched_processes`, each with its own copy of `pipe` and
            `network`; each returns the complete result.
        save_images: a folder for the images and a `metadata.jsonl` with prompt ("text") and seed of each, as
            `datasets` reads it.
        grid: a file for a grid of the first samples of the first prompts.
        kwargs: for `iter_images`: `batch_size`, `progress`, and arguments of the pipeline's call.

    Returns:
        The measurements, and the prompt of each image.

    Raises:
        ValueError: num_images below 1, a `save_images` folder that already contains images, or as in `iter_images`.
    """
    processes = processes or Processes()
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    with processes.sync_errors():
        check_save_folder(save_images if processes.is_main else None)
    distinct = [None] if prompts is None else list(dict.fromkeys(prompts))
    groups = [distinct[i % len(distinct)] for i in range(num_images)]
    seeds = [seed + i // len(distinct) for i in range(num_images)]
    thumbnails: dict[int, Image.Image] = {}
    with processes.sync_errors():
        numbers = processes.split(range(num_images))
        conditions: Any = None if prompts is None else [groups[i] for i in numbers]
        progress = kwargs.pop("progress", True) and processes.is_main
        images = iter_images(pipe, conditions, [seeds[i] for i in numbers], progress=progress, **kwargs)
        if save_images is not None:
            images = save_each_image(images, Path(save_images), numbers)
        if grid is not None:
            wanted = {number for row in _grid_rows(num_images, len(distinct)) for number in row}
            images = record_thumbnails(images, numbers, GRID_CELL, wanted, thumbnails)
        own = measure_images(images, network, progress=False)
    measured = Measurements.concatenate(processes.gather(own))
    shown = {number: image for part in processes.gather(thumbnails) for number, image in part.items()}
    with processes.sync_errors():
        if save_images is not None and processes.is_main:
            _write_metadata(Path(save_images), groups, seeds)
        if grid is not None and processes.is_main:
            rows = [[shown[number] for number in row] for row in _grid_rows(num_images, len(distinct))]
            sample_grid(rows, None if prompts is None else [str(prompt) for prompt in distinct[:GRID_ROWS]], grid)
    return measured, groups


def _grid_rows(num_images: int, num_prompts: int) -> list[range]:
    """Indices of the images in each row of the sample grid: image i belongs to prompt i mod P."""
    last = min(num_images, GRID_COLUMNS * num_prompts)
    return [range(row, last, num_prompts) for row in range(min(num_prompts, GRID_ROWS))]


def _write_metadata(folder: Path, prompts: list[Any], seeds: list[int]) -> None:
    """Write `metadata.jsonl` with file name, prompt and seed of each generated image, as `datasets` reads it."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            row = {"file_name": image_file_name(number), "text": prompt, "seed": seed}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

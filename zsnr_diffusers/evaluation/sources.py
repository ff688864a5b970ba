"""Luminance values from where images come from: a folder of them, or a pipeline."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..images import ImageError, find_images
from ._extras import import_extra
from .generation import iter_images
from .luminance import Floats, mean_luminance
from .plots import sample_grid

GRID_ROWS, GRID_COLUMNS, GRID_CELL = 8, 8, 256
"""Most prompts and seeds that the grid of samples shows, and the side of its cells in pixels."""


def images_in(folder: str | PathLike[str]) -> list[Path]:
    """All images below a folder, sorted by path.

    Raises:
        ValueError: there are none.
        OSError: the folder does not exist or is none.
    """
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} holds no images, at any depth; is it the right one?")
    return paths


def folder_luminance(
    folder: str | PathLike[str], on_bad_image: Literal["fail", "skip"] = "fail"
) -> tuple[Floats, list[str]]:
    """Mean luminance of every image below a folder.

    Args:
        folder: searched at any depth, in the order of the paths.
        on_bad_image: "skip" leaves unreadable images out, naming each and their number on stderr.

    Returns:
        The values [n], and the paths that were skipped.

    Raises:
        ImageError: an unreadable image, with "fail".
        ValueError: no images, or none that can be read.
        OSError: the folder does not exist or is none.
    """
    paths = images_in(folder)
    values, skipped = [], []
    for path in import_extra("tqdm").tqdm(paths, desc=str(folder), unit="image", disable=None):
        try:
            values.append(mean_luminance([path]))
        except ImageError as error:
            if on_bad_image == "fail":
                raise ImageError(f"{error}; repair or remove it, or skip such images (--on_bad_image skip)") from error
            print(f"skipped: {error}", file=sys.stderr)
            skipped.append(str(path))
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images in {folder}", file=sys.stderr)
    if not values:
        raise ValueError(f"none of the {len(paths)} images in folder {str(folder)!r} can be read")
    return np.concatenate(values), skipped


def pipeline_luminance(
    pipe: Any,
    prompts: Sequence[Any] | None,
    num_images: int,
    seed: int = 0,
    *,
    save_images: str | PathLike[str] | None = None,
    grid: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[Floats, list[Any]]:
    """Generate images and measure each; none is kept in memory.

    Image i has prompt i mod P and seed `seed` + i div P: the prompts share their seeds, and share the images evenly.

    Args:
        pipe: any pipeline that `iter_images` takes.
        prompts: distinct prompts or class labels; None for an unconditional pipeline.
        num_images: how many in all.
        seed: of the first image of each prompt.
        save_images: a folder for the images and a `metadata.jsonl` with prompt ("text") and seed of each, as
            `datasets` reads it.
        grid: a file for a grid of the first samples of the first prompts.
        kwargs: for `iter_images`: `batch_size`, `progress`, and arguments of the pipeline's call.

    Returns:
        The values [num_images], and the prompt of each.

    Raises:
        ValueError: no images asked for, or a `save_images` folder that holds images already.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_save_folder(save_images)
    distinct = [None] if prompts is None else list(dict.fromkeys(prompts))
    groups = [distinct[i % len(distinct)] for i in range(num_images)]
    seeds = [seed + i // len(distinct) for i in range(num_images)]
    conditions: Any = None if prompts is None else groups
    images: Iterable[Image.Image] = iter_images(pipe, conditions, seeds, **kwargs)
    if save_images is not None:
        images = _saving(images, Path(save_images), groups, seeds)
    if grid is not None:
        images = _making_grid(images, Path(grid), distinct)
    return mean_luminance(images), groups


def check_save_folder(folder: str | PathLike[str] | None) -> None:
    """Refuse a folder that already holds images, with which new ones would mix.

    Raises:
        ValueError: it does.
    """
    if folder is not None and Path(folder).exists() and find_images(folder):
        raise ValueError(f"folder {str(folder)!r} already holds images, which would mix; name an empty or a new one")


def _saving(
    images: Iterable[Image.Image], folder: Path, prompts: list[Any], seeds: list[int]
) -> Iterator[Image.Image]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
            row = {"file_name": f"{i:06d}.png", "text": prompt, "seed": seed}
            image.save(folder / f"{i:06d}.png")
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
            yield image


def _making_grid(images: Iterable[Image.Image], path: Path, prompts: list[Any]) -> Iterator[Image.Image]:
    rows: list[list[Image.Image]] = [[] for _ in prompts[:GRID_ROWS]]
    for i, image in enumerate(images):
        column, row = divmod(i, len(prompts))
        if row < GRID_ROWS and column < GRID_COLUMNS:
            thumbnail = image.copy()
            thumbnail.thumbnail((GRID_CELL, GRID_CELL))
            rows[row].append(thumbnail)
        yield image
    labels = None if prompts == [None] else [str(prompt) for prompt in prompts[:GRID_ROWS]]
    sample_grid(rows, labels, path)

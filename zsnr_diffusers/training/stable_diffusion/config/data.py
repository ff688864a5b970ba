"""Captioned images: how they are read, varied and cached."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from ...config import IDENTITY, NOT_NEGATIVE, SHARE, Captions, DataConfig, option
from ...config.data import is_encoded


@dataclass
class CaptionedDataConfig(DataConfig):
    """Captioned images: captions, cropping, and caches."""

    caption_column: str = option(
        "text",
        "Column of the captions; from a list of captions, a random one is used each time. In tars of --train_shards: "
        "`text` means .txt, or else this field of .json; another name is a field of .json.",
    )
    caption_extension: str = option(
        ".txt",
        "Extension of the caption files in --train_data_dir, if it has no metadata. Each line is a caption; in .json "
        "files, captions are in the field --caption_column. Images without a caption file are skipped, and some are "
        "listed.",
    )
    caption_dropout: Annotated[float, SHARE] = option(
        0.1, "Fraction of captions replaced with the empty caption, for classifier-free guidance."
    )
    shuffle_tags: Annotated[bool, IDENTITY] = option(
        False,
        "Captions are comma-separated tags: shuffle all but the first --keep_tags each time. Text embeddings cannot "
        "be cached then.",
    )
    keep_tags: Annotated[int, NOT_NEGATIVE, IDENTITY] = option(
        0,
        "Number of tags at the beginning of a caption that are not shuffled or dropped: a subject, a style, a "
        "trigger word.",
    )
    tag_dropout: Annotated[float, SHARE, IDENTITY] = option(
        0.0, "Probability of dropping each other tag, drawn again each time. Text embeddings cannot be cached then."
    )
    aspect_ratio_buckets: Annotated[bool, IDENTITY] = option(
        False,
        "Approximately keep aspect ratios: resize and crop each image to the bucket with the closest aspect ratio, "
        "with an area of at most --resolution squared. Every global batch has one size. For tars of --train_shards, "
        "image sizes are read with the headers before the start; for parquet files, all images are read once.",
    )
    random_crop: Annotated[bool, IDENTITY] = option(
        False,
        "Crop images at a random position instead of the center; latents cannot be cached then.",
    )
    cache: Literal["auto", "none", "latents", "text", "both"] = option(
        "auto",
        "What to compute once and cache: latents, text (embeddings), both, none, or auto: as much as fits into half "
        "of the free disk space. With --random_crop only text, with shuffled or dropped tags only latents, with "
        "--train_shards nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_encoded(self.train_data_dir) and (self.random_crop or self.cache not in ("auto", "both")):
            option = "--random_crop" if self.random_crop else f"--cache={self.cache}"
            raise ValueError(
                f"{option}: --train_data_dir={self.train_data_dir} contains precomputed latents and text embeddings, "
                "but no images; omit the option, or pass the image folder."
            )
        if self.keep_tags and not self.varies_tags:
            raise ValueError(
                f"--keep_tags={self.keep_tags} has no effect without --shuffle_tags or --tag_dropout: pass one of "
                "them too."
            )
        if self.varies_tags and (self.cache in ("text", "both") or is_encoded(self.train_data_dir)):
            option = "--shuffle_tags" if self.shuffle_tags else f"--tag_dropout={self.tag_dropout}"
            raise ValueError(
                f"{option} changes captions each time, so text embeddings cannot be cached: pass --cache=latents, "
                "auto or none, and the image folder."
            )
        if not re.fullmatch(r"\.[^/\\]*[^/\\.]", self.caption_extension):
            raise ValueError(
                f"--caption_extension={self.caption_extension!r} is not a file extension: begin with a dot, as in "
                ".txt."
            )
        if self.random_crop and self.cache in ("latents", "both"):
            raise ValueError(
                f"--cache={self.cache} stores the latents of each image once, but --random_crop crops each image "
                "differently in each epoch: pass --cache=text, auto or none, or omit --random_crop."
            )

    @property
    def columns(self) -> dict[str, str]:
        """Data columns to read, that of captions included."""
        return {**super().columns, "caption_column": self.caption_column}

    @property
    def needs_image_sizes(self) -> bool:
        """True for aspect-ratio buckets."""
        return self.aspect_ratio_buckets

    @property
    def captions(self) -> Captions:
        """Column and file extension of captions."""
        return Captions(self.caption_column, self.caption_extension)

    @property
    def cached(self) -> tuple[str, ...]:
        """Which encoders' results may be cached: `latents`, `text`."""
        if is_encoded(self.train_data_dir):
            return ("latents", "text")
        # Shards may be more than any disk holds, and so may be what is computed of them.
        if self.cache == "none" or (self.cache == "auto" and self.train_shards):
            return ()
        chosen = (self.cache,) if self.cache in ("latents", "text") else ("latents", "text")
        idle = {"latents": self.random_crop or not self.reads_images, "text": self.varies_tags}
        return tuple(name for name in chosen if not idle[name])

    @property
    def reads_images(self) -> bool:
        """Whether a training sample holds an image or its latents."""
        return True

    @property
    def varies_tags(self) -> bool:
        """Whether a row gives other captions each time, by the order or choice of their tags."""
        return self.shuffle_tags or self.tag_dropout > 0

"""`zsnr fit-start`: fit what an epsilon model expects in its starting noise, by prompt."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.command_line import CommandParser
from ..utils.extras import import_extra
from ..utils.tables import Text
from ..utils.terminal import show
from . import generation
from .arguments import add_claim_options, command_parser

DESCRIPTION = """\
Generates dark and bright images with an epsilon model, without retraining it. Such a model infers the brightness of an
image from the signal left in the noise at the last timestep, but sampling starts from noise without this signal. The
command fits the missing signal, given the prompt, to captioned images. It uses the model's autoencoder and text
encoders, does not call the UNet and does not change weights; it takes minutes on a CPU for thousands of images.

The result works with every model that shares autoencoder and text encoders with BASE, as most of its fine-tunes do."""

EXAMPLES = """\
examples:
  a folder of images with caption files or metadata, as for training:
    zsnr fit-start stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir photos --output start.safetensors

  a dataset on the Hub, with a cache for later runs:
    zsnr fit-start my-sdxl-finetune --dataset_name me/captioned --cache_dir cache --output start.safetensors

  evaluate the result:
    zsnr evaluate --real photos --pipeline my-sdxl-finetune --start start.safetensors --prompts "a night sky" "snow"

exit status: 0 success, 1 captions do not predict the brightness of held-out images, 2 wrong arguments or data
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr fit-start`."""
    parser = command_parser("fit-start", DESCRIPTION, EXAMPLES)
    parser.add_argument("pipeline", metavar="BASE", help="folder, Hub id or .safetensors file of a pipeline")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--train_data_dir", metavar="FOLDER", help="folder of images with captions, as for training")
    data.add_argument("--dataset_name", metavar="ID", help="dataset on the Hub, or any path for datasets.load_dataset")
    parser.add_argument("--output", metavar="FILE", required=True, help="output file (.safetensors)")
    parser.add_argument("--image_column", default="image", metavar="NAME", help="(default: image)")
    parser.add_argument("--caption_column", default="text", metavar="NAME", help="(default: text)")
    parser.add_argument("--caption_extension", default=".txt", help="extension of caption files (default: .txt)")
    parser.add_argument(
        "--on_bad_image", choices=("fail", "skip"), default="fail", help="skipped images are named (default: fail)"
    )
    parser.add_argument("--no_captions", action="store_true", help="fit one start for all prompts")
    parser.add_argument(
        "--resolution", type=int, help="pixels per side for encoding (default: the model's, at most 128)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="fraction of noise to keep in low frequencies; 1 as in training (default: 0)",
    )
    parser.add_argument("--cache_dir", metavar="FOLDER", help="cache folder for features of images and captions")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32)")
    parser.add_argument(
        "--variant", help="variant of the weights, such as fp16 (default: none, or the only one available)"
    )
    add_claim_options(parser, "the network")
    parser.add_argument("--device", help="device for networks (default: cuda or mps if available, else cpu)")
    parser.set_defaults(lora=None, guidance_rescale=None, keep_low_frequencies=None, no_start=True)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run `zsnr fit-start`: write the start and print its report; returns 1 if captions do not predict brightness."""
    from ..start.fit import check_data, fit_start
    from ..start.report import StartReport

    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {arguments.output!r}: a start is written as .safetensors")
    import_extra("tqdm", "train")
    images, captions = _open_data(arguments)
    check_data(len(images), captions)  # check before anything is loaded
    pipe = generation.load_pipeline(arguments, arguments.device or generation.default_device())
    start = fit_start(
        pipe,
        images,
        captions,
        resolution=arguments.resolution,
        noise=arguments.noise,
        **_cache(arguments.cache_dir),
    )
    start.save(output)
    report = StartReport.of(start.report)
    show(report)
    show(Text(f'use it:\nzsnr_diffusers.enable_start(pipe, "{output.as_posix()}")'))
    return 0 if report.explained[0][0] or arguments.no_captions else 1


def _open_data(arguments: argparse.Namespace) -> tuple[Sequence[Any], list[Any] | None]:
    """Images and captions of `--train_data_dir` or `--dataset_name`, read as training reads them."""
    import_extra("datasets", "train")
    from ..training.data.dataset import check_images, open_rows
    from ..training.data.file_index import FILE_NAME, FileIndex
    from ..training.stable_diffusion.config import CaptionedDataConfig

    names = ("train_data_dir", "dataset_name", "image_column", "caption_column", "caption_extension", "on_bad_image")
    config = CaptionedDataConfig(**{name: getattr(arguments, name) for name in names})
    rows = open_rows(config)
    folder = arguments.cache_dir
    usable = [*check_images(rows, config, index=FileIndex(Path(folder, FILE_NAME)) if folder else None)]
    captions = None
    if not arguments.no_captions:
        column = rows.select_columns([config.caption_column])
        captions = [column[index][config.caption_column] or "" for index in usable]
    return _Images(rows, config.image_column, usable), captions


class _Images(Sequence[Any]):
    """Images of data rows, opened one by one."""

    def __init__(self, rows: Any, column: str, indices: Sequence[int]) -> None:
        self._rows, self._column, self._indices = rows, column, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        image = self._rows[self._indices[place]][self._column]
        return image["path"] if image["bytes"] is None else image["bytes"]

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))


def _cache(folder: str | None) -> dict[str, Any]:
    """The cache of `--cache_dir` as an argument of `fit_start`."""
    if folder is None:
        return {}
    from ..training.stable_diffusion.row_cache import Cache

    return {"open_cache": lambda name, facts: Cache(Path(folder), f"start-{name}", facts)}

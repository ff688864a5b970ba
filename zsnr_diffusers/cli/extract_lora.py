"""`zsnr extract-lora`: the difference between a retrained model and its base as a LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..utils.command_line import CommandParser
from ..utils.tables import Text
from ..utils.terminal import show
from .arguments import (
    add_claim_options,
    add_recorded_guidance_options,
    add_target_options,
    check_target_options,
    command_parser,
)
from .generation import guidance_options

DESCRIPTION = """\
Extracts what retraining changed as a LoRA: the best approximation of the given rank, by singular value decomposition,
of the difference between the weights of a retrained model and its base, for each linear layer and convolution of the
UNet, and of the text encoders if they differ. Nothing is trained. Applied to the base, the LoRA reproduces the
retrained model as far as it keeps the difference. Applied to fine-tunes of the base, it adds the brightness, but
changes their style more than a LoRA trained on the base (python -m zsnr_diffusers.training --lora_rank).

The output is the same as the trainer's: a file in diffusers' format with the scheduler, and one in kohya's; a target
that ends in .safetensors is a single file in kohya's format. The command prints how much of the difference the LoRA
keeps, as a fraction of its squared norm: biases, norms and embeddings cannot be part of a LoRA and are lost."""

EXAMPLES = """\
examples:
  what made Stable Diffusion 1.5 a zero-SNR model, in half precision:
    zsnr extract-lora sd15-zsnr stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 --dtype float16 \\
      --output_dir sd15-zsnr-lora

  the same for two single files, the first without a recorded prediction type:
    zsnr extract-lora zsnr.safetensors base.safetensors --prediction_type v_prediction --rescale_betas_zero_snr \\
      --config stable-diffusion-v1-5/stable-diffusion-v1-5 --output_dir zsnr-lora

then, in Python, for a pipeline of the base:
    zsnr_diffusers.load_lora(pipe, "sd15-zsnr-lora")

exit status: 0 done, 2 wrong arguments or data
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr extract-lora`."""
    parser = command_parser("extract-lora", DESCRIPTION, EXAMPLES)
    parser.add_argument("retrained", metavar="RETRAINED", help="folder, Hub id or .safetensors file of a pipeline")
    parser.add_argument("base", metavar="BASE", help="likewise: the model it was trained from")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="output folder or file")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA (default: 32)")
    add_claim_options(parser, "RETRAINED")
    add_recorded_guidance_options(parser, "the value that RETRAINED records")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the LoRA (default: that of RETRAINED if it is local and uniform, else float32)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH_OR_ID",
        help="for single files: a pipeline with their architecture, as in zsnr convert (default: from the Hub)",
    )
    parser.add_argument("--device", help="device for the decomposition (default: cuda if available, else cpu)")
    add_target_options(parser, "the LoRA")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr extract-lora`: write the LoRA, and print how much of the difference it keeps."""
    import torch

    from ..hub.lora import save_lora
    from ..hub.lora_extract import extract_lora
    from ..hub.lora_files import LORA_FILE
    from ..hub.save import check_target

    check_target_options(arguments)
    check_target(Path(arguments.output_dir), arguments.overwrite, LORA_FILE)
    extracted = extract_lora(
        arguments.retrained,
        arguments.base,
        arguments.rank,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        prediction_type=arguments.prediction_type,
        rescale_betas_zero_snr=arguments.rescale_betas_zero_snr,
        config=arguments.config,
        **guidance_options(arguments),
    )
    upload = {"push_to_hub": arguments.push_to_hub, "private": arguments.private}
    save_lora(extracted.pipeline, arguments.output_dir, **upload)
    show(extracted)
    show(Text(f"written: {arguments.output_dir}"))

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
Extracts from a retrained model what retraining changed, as a LoRA: of the difference between its weights and those of
its base, for each linear layer and convolution of the UNet, and of the text encoders if they differ, the best
approximation of the rank by singular value decomposition. Nothing is trained. On the base the LoRA gives the retrained
model again, as far as it keeps the difference. On fine-tunes of the base it brings the brightness, but takes more of
their style than a LoRA that was trained on the base (python -m zsnr_diffusers.training --lora_rank).

Written are the files of a LoRA that the trainer writes: by diffusers' names with the scheduler beside them, and by
kohya's; a target that ends in .safetensors is one file of the latter. Printed is how much of the difference the LoRA
keeps, as a share of its squared norm: biases, norms and embeddings have no place in a LoRA, and are lost."""

EXAMPLES = """\
examples:
  what made Stable Diffusion 1.5 a zero-SNR model, in half precision:
    zsnr extract-lora sd15-zsnr stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 --dtype float16 \\
      --output_dir sd15-zsnr-lora

  the same of two single files, the first of which does not say what it predicts:
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
    parser.add_argument("base", metavar="BASE", help="likewise: what it was trained from")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="where to write the LoRA")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default: 32)")
    add_claim_options(parser, "RETRAINED")
    add_recorded_guidance_options(parser, "what RETRAINED records")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the LoRA (default: that of RETRAINED if it is here and has one for all, else float32)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH_OR_ID",
        help="for single files: a pipeline of their architecture, as for zsnr convert (default: the Hub's)",
    )
    parser.add_argument("--device", help="where weights are decomposed (default: cuda if there is one, else cpu)")
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

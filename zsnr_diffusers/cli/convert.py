"""`zsnr convert`: convert models between folders, the Hub and single files, including their schedule and guidance."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import CommandParser
from ..utils.tables import KeyValues, Part, Report
from ..utils.terminal import show
from .arguments import (
    CLAIMS,
    add_claim_options,
    add_recorded_guidance_options,
    add_target_options,
    check_target_options,
    command_parser,
)
from .generation import guidance_options, refuse_guidance_options

if TYPE_CHECKING:
    from ..hub.saved_model import SavedModel

DESCRIPTION = """\
Saves a pipeline or a LoRA in another format. A target that ends in .safetensors becomes a single file: a pipeline in
the original layout of Stable Diffusion 1.x, 2.x or XL, with the keys v_pred and ztsnr where they apply, a LoRA with
the names of kohya's scripts. Any other target becomes a diffusers folder without custom classes; a LoRA's folder
includes the scheduler. Prediction type and schedule are read from the source or from the options; a file that does not
record them is refused rather than guessed.

Using the result: diffusers and InvokeAI read everything from the folder, but only the weights from a file. ComfyUI and
Forge read the keys of an SDXL file. For SD 1.x or 2.x, ComfyUI needs the node ModelSamplingDiscrete (v_prediction,
zsnr) and Forge a .yaml next to it. Pass --v_parameterization --zero_terminal_snr to kohya's scripts. Set the guidance
rescale there yourself, in ComfyUI with the node RescaleCFG. See examples/guides/other_programs.md."""

EXAMPLES = """\
examples:
  a trained folder for other programs, in half precision:
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16

  a v-prediction checkpoint with the corresponding keys, for diffusers:
    zsnr convert model.safetensors model-folder

  a trained folder, and a single file of it, in one Hub repo:
    zsnr convert sd21-zsnr sd21-zsnr-fp16 --dtype float16 --push_to_hub me/sd21-zsnr
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16 --push_to_hub me/sd21-zsnr

  a LoRA without recorded schedule, saved with its schedule and scheduler:
    zsnr convert lora.safetensors lora-folder --prediction_type v_prediction --rescale_betas_zero_snr \\
      --config sd15-folder

  a trained LoRA for ComfyUI and others:
    zsnr convert sd15-zsnr-lora sd15-zsnr-lora.safetensors --dtype float16

  a file without recorded prediction type, without access to the Hub:
    zsnr convert old.safetensors folder --prediction_type v_prediction --rescale_betas_zero_snr --config sdxl-folder

  a Stable Diffusion model fine-tuned to flow matching, for which no file key exists:
    zsnr convert rf.safetensors folder --prediction_type flow_prediction --config sdxl-folder

exit status: 0 success, 2 wrong arguments or data
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr convert`."""
    parser = command_parser("convert", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="Hub id, folder, or .safetensors file of a pipeline or LoRA")
    parser.add_argument("target", metavar="TARGET", help="folder, or a name that ends in .safetensors")
    add_claim_options(parser, "the network")
    add_recorded_guidance_options(parser, "what is recorded")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the weights (default: the source's if it is local and uniform, else float32)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH_OR_ID",
        help="for a single file or a LoRA: a pipeline with its architecture; only its configs are read, and from a "
        "folder also components missing from the file (default: from the Hub)",
    )
    parser.add_argument(
        "--vae",
        metavar="PATH_OR_ID",
        help="for a single file: folder, Hub id or file of an autoencoder, to add or replace it",
    )
    parser.add_argument(
        "--variant", help="variant of a pipeline's weights, such as fp16 (default: none, or the only one available)"
    )
    parser.add_argument("--weight_name", metavar="FILE", help="file name of a LoRA in a folder or repo")
    add_target_options(parser, "the target")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr convert`: convert a pipeline or LoRA, and print what was detected."""
    from ..hub.claims import scheduler_claim
    from ..hub.saved_model import SavedModel

    check_target_options(arguments)
    try:
        told = {name: getattr(arguments, name) for name in CLAIMS}
        saved = SavedModel.open(arguments.source, weight_name=arguments.weight_name, **told)
        pipe, what = (_convert_lora if saved.is_lora else _convert_pipeline)(arguments, saved)
    except TypeError as error:
        refuse_guidance_options(error, guidance_options(arguments))
        raise
    claim = scheduler_claim(pipe.scheduler.config)
    found = {
        "prediction_type": claim.prediction_type,
        "rescale_betas_zero_snr": claim.rescale_betas_zero_snr,
        "guidance_rescale": getattr(pipe, "default_guidance_rescale", 0.0),
    }
    if k := getattr(pipe, "default_keep_low_frequencies", 0):
        found["keep_low_frequencies"] = k
    show(Converted(arguments.target, what, found, arguments.push_to_hub))


@dataclass(frozen=True)
class Converted(Report):
    """What was written, what was detected, and where it was uploaded."""

    target: str
    what: str
    found: Mapping[str, Any]
    pushed_to: str | None

    def __str__(self) -> str:
        """One line, for logs."""
        found = ", ".join(f"{name}={value}" for name, value in self.found.items())
        return f"{self.target}: {self.what}, {found}" + (f"; pushed to {self.pushed_to}" if self.pushed_to else "")

    def parts(self) -> Iterator[Part]:
        """A table of what was written: the model, its schedule and guidance rescale, and where it was uploaded."""
        rows = {"model": self.what, **self.found} | ({"pushed to": self.pushed_to} if self.pushed_to else {})
        yield KeyValues(("written", self.target), tuple((name, str(value)) for name, value in rows.items()))


def _convert_pipeline(arguments: argparse.Namespace, saved: SavedModel) -> tuple[Any, str]:
    """Save the pipeline as folder or single file; returns it and the name of its class."""
    from ..hub.load import load_pipeline
    from ..hub.save import check_target, save_pipeline

    check_target(Path(arguments.target), arguments.overwrite)
    if arguments.config is not None and not saved.is_single_file:
        raise ValueError("--config requires a single file or a LoRA; a folder has its own.")
    if arguments.vae is not None and not saved.is_single_file:
        raise ValueError("--vae requires a single file; a folder has its own.")
    if saved.is_single_file:
        _check_prediction_type_known(saved)
    given = {"config": arguments.config, "variant": arguments.variant, "vae": arguments.vae}
    options = {name: value for name, value in given.items() if value is not None}
    options |= guidance_options(arguments)
    pipe = load_pipeline(saved, dtype=_resolve_dtype(arguments, saved), **options)
    save_pipeline(pipe, arguments.target, overwrite=arguments.overwrite, **_upload_kwargs(arguments))
    return pipe, type(pipe).__name__


def _check_prediction_type_known(saved: SavedModel) -> None:
    """Refuse a single file without a recorded prediction type, since the output would record a guess."""
    if saved.prediction_type is None:
        raise ValueError(
            f"{saved.name} does not record its prediction type, which the output would record: pass --prediction_type "
            "epsilon (most SD 1.x and SDXL models), --prediction_type v_prediction, or --prediction_type "
            "flow_prediction."
        )


def _convert_lora(arguments: argparse.Namespace, saved: SavedModel) -> tuple[Any, str]:
    """Save the LoRA, using a pipeline of its base without weights; returns the pipeline and a description."""
    from ..hub.empty_pipeline import empty_pipeline
    from ..hub.lora import load_lora, save_lora
    from ..hub.lora_files import LORA_FILE, find_lora_base
    from ..hub.save import check_target

    check_target(Path(arguments.target), arguments.overwrite, LORA_FILE)
    base = arguments.config or find_lora_base(saved.name, saved.header)
    pipe = empty_pipeline(base, _resolve_dtype(arguments, saved))
    load_lora(pipe, saved, **guidance_options(arguments))
    save_lora(pipe, arguments.target, **_upload_kwargs(arguments))
    return pipe, f"LoRA of {base}"


def _upload_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--push_to_hub` and `--private` as arguments of `save_pipeline` and `save_lora`."""
    return {"push_to_hub": arguments.push_to_hub, "private": arguments.private}


def _resolve_dtype(arguments: argparse.Namespace, saved: SavedModel) -> Any:
    """`--dtype`, or else the dtype of the source's weights."""
    import torch

    from ..hub.weight_files import stored_dtype

    return getattr(torch, arguments.dtype) if arguments.dtype else stored_dtype(saved)

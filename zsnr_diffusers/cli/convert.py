"""`zsnr convert`: models between folders, the Hub and single files, with what their schedule and guidance are."""

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
Saves a pipeline or a LoRA in another form. A target that ends in .safetensors becomes a single file: a pipeline in the
original layout of Stable Diffusion 1.x, 2.x or XL, with the keys v_pred and ztsnr where they apply, a LoRA with the
names of kohya's scripts. Any other target becomes a folder of diffusers with stock classes, that of a LoRA with the
scheduler beside the weights. What the model predicts and whether it ends in pure noise is found in the source, or told
here: a file that does not say it is not converted on a guess.

Where to with it: diffusers and InvokeAI open the folder and find all in it; of a file they read the weights alone.
ComfyUI and Forge read the keys of an XL file. With one of 1.x or 2.x, ComfyUI needs the node ModelSamplingDiscrete
(v_prediction, zsnr) and Forge a .yaml beside it. kohya's scripts are told by --v_parameterization --zero_terminal_snr.
The guidance rescale is for you to set there, in ComfyUI by the node RescaleCFG. The steps are in
examples/guides/other_programs.md."""

EXAMPLES = """\
examples:
  a trained folder for other programs, in half precision:
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16

  a v-prediction checkpoint, whose keys say so, for diffusers:
    zsnr convert model.safetensors model-folder

  a trained folder, and the file of it, into one repo of the Hub, which says what the model is:
    zsnr convert sd21-zsnr sd21-zsnr-fp16 --dtype float16 --push_to_hub me/sd21-zsnr
    zsnr convert sd21-zsnr sd21-zsnr.safetensors --dtype float16 --push_to_hub me/sd21-zsnr

  a LoRA that does not say what it was trained on, so that it does, and with its scheduler beside it:
    zsnr convert lora.safetensors lora-folder --prediction_type v_prediction --rescale_betas_zero_snr \\
      --config sd15-folder

  a trained LoRA for ComfyUI and others:
    zsnr convert sd15-zsnr-lora sd15-zsnr-lora.safetensors --dtype float16

  from a file that does not say what it is, where the Hub cannot be reached:
    zsnr convert old.safetensors folder --prediction_type v_prediction --rescale_betas_zero_snr --config sdxl-folder

  a Stable Diffusion that was trained on to flow matching, which no key in a file says:
    zsnr convert rf.safetensors folder --prediction_type flow_prediction --config sdxl-folder

exit status: 0 done, 2 wrong arguments or data
"""


def new_parser() -> CommandParser:
    """The parser of `zsnr convert`."""
    parser = command_parser("convert", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="Hub id, folder, or .safetensors file, of a pipeline or LoRA")
    parser.add_argument("target", metavar="TARGET", help="folder, or a name that ends in .safetensors")
    add_claim_options(parser, "the network")
    add_recorded_guidance_options(parser, "what is recorded")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: the source's if it is here and has one for all, else float32)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH_OR_ID",
        help="for a single file or a LoRA: a pipeline of its architecture, of which configs alone are read, and of a "
        "folder the parts that the file has not (default: the Hub's)",
    )
    parser.add_argument(
        "--vae",
        metavar="PATH_OR_ID",
        help="for a single file without one, or in place of its own: an autoencoder, a pipeline's or a file's",
    )
    parser.add_argument("--variant", help="of a pipeline's weights, such as fp16 (default: none, or the only one)")
    parser.add_argument("--weight_name", metavar="FILE", help="for a LoRA in a folder or repo: its file's name")
    add_target_options(parser, "the target")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `zsnr convert`: convert a pipeline or LoRA, and print what was found in the source."""
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
    """What was written where, what was found of it, and where it was pushed to."""

    target: str
    what: str
    found: Mapping[str, Any]
    pushed_to: str | None

    def __str__(self) -> str:
        """One line, for logs of many."""
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
        raise ValueError("--config goes with a single file or a LoRA; a folder has its own.")
    if arguments.vae is not None and not saved.is_single_file:
        raise ValueError("--vae goes with a single file; a folder has its own.")
    if saved.is_single_file:
        _check_prediction_type_known(saved)
    given = {"config": arguments.config, "variant": arguments.variant, "vae": arguments.vae}
    options = {name: value for name, value in given.items() if value is not None}
    options |= guidance_options(arguments)
    pipe = load_pipeline(saved, dtype=_resolve_dtype(arguments, saved), **options)
    save_pipeline(pipe, arguments.target, overwrite=arguments.overwrite, **_upload_kwargs(arguments))
    return pipe, type(pipe).__name__


def _check_prediction_type_known(saved: SavedModel) -> None:
    """Refuse a single file that does not say what it predicts: what is written would say it for good."""
    if saved.prediction_type is None:
        raise ValueError(
            f"{saved.name} does not say what it predicts, and what is written would say it for good: pass "
            "--prediction_type epsilon, as most models of 1.x and XL do, --prediction_type v_prediction, or "
            "--prediction_type flow_prediction."
        )


def _convert_lora(arguments: argparse.Namespace, saved: SavedModel) -> tuple[Any, str]:
    """Save the LoRA, on a pipeline of its base without weights; returns that and what it is."""
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
    """`--dtype`, or else that of the source's weights."""
    import torch

    from ..hub.weight_files import stored_dtype

    return getattr(torch, arguments.dtype) if arguments.dtype else stored_dtype(saved)

"""What sampling starts from: a law of the low frequencies, for which base it is, and its file."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..core.low_frequency_law import LowFrequencyLaw
from ..utils.files import atomic_write

START_FILE = "start.safetensors"
"""Beside `model_index.json`."""

RECORDED_START = "_start"
"""Where `model_index.json` says that a start lies beside it. diffusers ignores names with an underscore."""

_METADATA = "zsnr_diffusers_start"
_VERSION = 1
_LAW = ("bias", "weight", "covariance", "bounds")
_WEIGHTS = "base."


@dataclass(frozen=True, eq=False)
class Start:
    """The start of an epsilon model: what remains of an image's low frequencies in x_T, which it was trained to see.

    Attributes:
        law: of the low frequencies of scaled latents x_0, given the features of a prompt.
        base: name of the pipeline that it was fitted for.
        weights: some weights of that pipeline's autoencoder and text encoders, by component, which tell whether
            another pipeline has the same; see `base_check`. Empty for a start that was made for a live pipeline.
        report: what the fit found, in types of JSON.
    """

    law: LowFrequencyLaw
    base: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the start to a `.safetensors` file.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_bytes(self.to_bytes())
        return path

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Start":
        """Read a start from its file.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or no start.
        """
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    def to_bytes(self) -> bytes:
        """The content of a start's file."""
        tensors = {name: getattr(self.law, name) for name in _LAW}
        tensors |= {f"{_WEIGHTS}{name}": values for name, values in self.weights.items()}
        about = {"version": _VERSION, "base": self.base, "noise": self.law.noise, "report": self.report}
        metadata = {_METADATA: json.dumps(about, allow_nan=False)}  # of several keys, safetensors mixes the order
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "Start":
        """Read a start from the content of its file; `name` is for errors.

        Raises:
            ValueError: it is damaged, or no start.
        """
        try:
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header.get("__metadata__", {}).get(_METADATA, "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{name} is damaged or no safetensors file: {error}. {FIT_ANOTHER}") from error
        if about.get("version") != _VERSION or not set(_LAW) <= set(tensors):
            what = f"of version {about['version']}" if "version" in about else "no start of zsnr_diffusers"
            raise ValueError(f"{name} is {what}, and version {_VERSION} is read here. {FIT_ANOTHER}")
        bias, weight, covariance, bounds = (tensors[key] for key in _LAW)
        law = LowFrequencyLaw(bias, weight, covariance, bounds, float(about["noise"]))
        _check_law(law, name)
        weights = {key.removeprefix(_WEIGHTS): tensors[key] for key in tensors if key.startswith(_WEIGHTS)}
        return cls(law, about["base"], weights, about["report"])

    def to_text(self) -> str:
        """The start as ASCII text without the weights of its base, for source code that stands alone."""
        alone = Start(self.law, self.base)
        return base64.b85encode(zlib.compress(alone.to_bytes(), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> "Start":
        """Read a start from `to_text`."""
        return cls.from_bytes(zlib.decompress(base64.b85decode(text)), "the start")


FIT_ANOTHER = "Fit one: zsnr fit-start BASE --train_data_dir IMAGES --output start.safetensors."


def check_noise(noise: float) -> None:
    """Refuse a share of noise outside [0, 1].

    Raises:
        ValueError: with the value and what it means.
    """
    if not 0 <= noise <= 1:
        raise ValueError(
            f"noise={noise} must lie in [0, 1]: at 1 low frequencies have all their noise, as in training, at 0 none."
        )


def _check_law(law: LowFrequencyLaw, name: str) -> None:
    """Refuse a law whose tensors do not go together, or hold what is no number."""
    size = law.bias.numel()
    wanted = {
        "weight": (size, *law.weight.shape[1:2]),
        "covariance": (size, size),
        "bounds": (2, *law.bias.shape),
    }
    wrong = [key for key, shape in wanted.items() if tuple(getattr(law, key).shape) != shape]
    if law.bias.ndim != 3 or law.weight.ndim != 2 or wrong:
        shapes = ", ".join(f"{key} {list(getattr(law, key).shape)}" for key in _LAW)
        raise ValueError(f"{name} is damaged: its shapes do not go together ({shapes}). {FIT_ANOTHER}")
    check_noise(law.noise)
    if broken := [key for key in _LAW if not bool(torch.isfinite(getattr(law, key)).all())]:
        raise ValueError(f"{name} is damaged: {broken[0]} is not finite. {FIT_ANOTHER}")

"""A start: the distribution of low frequencies in x_T, the base it was fitted for, and its file format."""

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
"""File name next to `model_index.json`."""

RECORDED_START = "_start"
"""Entry of `model_index.json` that records a start. diffusers ignores names with an underscore."""

_METADATA = "zsnr_diffusers_start"
_VERSION = 1
_LAW = ("bias", "weight", "covariance", "bounds")
_WEIGHTS = "base."


@dataclass(frozen=True, eq=False)
class Start:
    """The start of an epsilon model: the signal left in the low frequencies of x_T, which the model was trained with.

    Attributes:
        law: distribution of the low frequencies of scaled latents x_0, given the features of a prompt.
        base: name of the pipeline that it was fitted for.
        weights: a sample of the weights of that pipeline's autoencoder and text encoders, by component, to check
            whether another pipeline has the same; see `base_check`. Empty for a start that was created for a live
            pipeline.
        report: of the fit, as JSON-serializable values.
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
            OSError: the file does not exist.
            ValueError: it is damaged or not a start.
        """
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    def to_bytes(self) -> bytes:
        """The content of a start's file."""
        tensors = {name: getattr(self.law, name) for name in _LAW}
        tensors |= {f"{_WEIGHTS}{name}": values for name, values in self.weights.items()}
        about = {"version": _VERSION, "base": self.base, "noise": self.law.noise, "report": self.report}
        # A single key, since safetensors does not keep the order of several.
        metadata = {_METADATA: json.dumps(about, allow_nan=False)}
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "Start":
        """Read a start from the content of its file; `name` is for error messages.

        Raises:
            ValueError: it is damaged or not a start.
        """
        try:
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header.get("__metadata__", {}).get(_METADATA, "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{name} is damaged or not a safetensors file: {error}. {FIT_ANOTHER}") from error
        if about.get("version") != _VERSION or not set(_LAW) <= set(tensors):
            what = f"of version {about['version']}" if "version" in about else "not a start of zsnr_diffusers"
            raise ValueError(f"{name} is {what}; expected version {_VERSION}. {FIT_ANOTHER}")
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
    """Refuse a fraction of noise outside [0, 1].

    Raises:
        ValueError: with the value and its meaning.
    """
    if not 0 <= noise <= 1:
        raise ValueError(
            f"noise={noise} must lie in [0, 1]: at 1 low frequencies keep all their noise, as in training; at 0 none."
        )


def _check_law(law: LowFrequencyLaw, name: str) -> None:
    """Refuse a law with tensors of inconsistent shapes or values that are not finite."""
    size = law.bias.numel()
    wanted = {
        "weight": (size, *law.weight.shape[1:2]),
        "covariance": (size, size),
        "bounds": (2, *law.bias.shape),
    }
    wrong = [key for key, shape in wanted.items() if tuple(getattr(law, key).shape) != shape]
    if law.bias.ndim != 3 or law.weight.ndim != 2 or wrong:
        shapes = ", ".join(f"{key} {list(getattr(law, key).shape)}" for key in _LAW)
        raise ValueError(f"{name} is damaged: its shapes are inconsistent ({shapes}). {FIT_ANOTHER}")
    check_noise(law.noise)
    if broken := [key for key in _LAW if not bool(torch.isfinite(getattr(law, key)).all())]:
        raise ValueError(f"{name} is damaged: {broken[0]} is not finite. {FIT_ANOTHER}")

"""Read how programs record prediction type and schedule in a weights file, or next to it.

One function per format returns a `Claim`, which is empty if the file has no such record.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from .claims import Claim
from .header import Header

_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "velocity"), "v_prediction"),
    "flow_prediction": "flow_prediction",
}
"""No program marks flow matching by a key among the weights, and names differ; this is diffusers' name."""

_ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}

_ZERO_SNR = ("zero_terminal_snr", "rescale_betas_zero_snr", "ztsnr", "zsnr")
"""Names of the setting in metadata and in original configs."""

_EDM = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
"""Keys of models with continuous noise levels: CosXL and Playground 2.5."""

_TERMINAL = {"alphas_cumprod": (0.0, 1e-6), "sqrt_alphas_cumprod": (0.0, 1e-3), "betas": (1.0, 5e-4)}
"""Schedule buffers: the last value of each at zero terminal SNR, and the tolerance.

Substitutes for zero are 2^-24; the linear schedule of DDPM ends at 4e-5, the cosine schedule's last beta is 0.999.
"""


def key_claim(path: Any, header: Header) -> Claim:
    """The claim of empty tensors `v_pred` and `ztsnr` in a file; as in ComfyUI, `v_pred` alone means not zero-SNR.

    Raises:
        ValueError: a model with continuous noise levels.
    """
    if edm := [key for key in _EDM if key in header.shapes]:
        raise ValueError(
            f"{path} has the key {edm[0]!r}: it is for an EDM schedule, which is not variance-preserving. Load it "
            "with diffusers' from_single_file and the EDM scheduler it was published with."
        )
    v_prediction, zero_snr = "v_pred" in header.shapes, "ztsnr" in header.shapes
    return Claim(
        " and ".join(f"key {key}" for key in ("v_pred", "ztsnr") if key in header.shapes),
        "v_prediction" if v_prediction else None,
        zero_snr if v_prediction or zero_snr else None,
    )


def metadata_claims(header: Header) -> tuple[Claim, ...]:
    """Claims of a file's metadata: keys of ModelSpec, ComfyUI, without a prefix, and of kohya."""
    data = {key: value.strip() for key, value in header.metadata.items()}
    spec = (_modelspec_prediction_type(data), _architecture_prediction_type(data.get("modelspec.architecture", "")))
    return (
        Claim("modelspec metadata", next(filter(None, spec), None)),
        Claim("metadata modelspec.predict_key", parse_prediction_type(data.get("modelspec.predict_key"))),
        _unprefixed_claim(data),
        _kohya_claim(data),
    )


def _modelspec_prediction_type(data: Mapping[str, str]) -> str | None:
    """Prediction type in ModelSpec metadata; velocity means flow if the noise process is flow."""
    said = parse_prediction_type(data.get("modelspec.prediction_type"))
    if data.get("modelspec.noise_process", "").lower() != "flow":
        return said
    return "flow_prediction" if said in (None, "v_prediction", "flow_prediction") else None


def parse_prediction_type(name: Any) -> str | None:
    """The prediction type that a name in metadata or an original config means; None for other names."""
    return _PREDICTIONS.get(str(name).lower())


def _architecture_prediction_type(name: str) -> str | None:
    """Prediction type that a ModelSpec architecture name implies, None if it implies none."""
    return _ARCHITECTURES.get(name.partition("/")[0])  # for a LoRA, "/lora" follows


def _unprefixed_claim(data: Mapping[str, str]) -> Claim:
    """The claim of metadata keys without a program's prefix."""
    switches = [value for key in _ZERO_SNR if (value := _parse_flag(data.get(key))) is not None]
    return Claim("metadata", parse_prediction_type(data.get("prediction_type")), next(iter(switches), None))


def _parse_flag(value: Any) -> bool | None:
    """A metadata flag ("true", "1", "false", "0") as bool, None for other values."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _kohya_claim(data: Mapping[str, str]) -> Claim:
    """The claim of kohya's metadata: v-prediction by the base's version in sd-scripts, or by similar keys of other
    programs.
    """
    said = {key for key, value in data.items() if _parse_flag(value)}
    v_prediction = data.get("ss_base_model_version", "").endswith("_v") or "ss_v_parameterization" in said
    return Claim(
        "kohya's metadata",
        "v_prediction" if v_prediction else None,
        True if "ss_zero_terminal_snr" in said else None,
    )


def buffer_claim(path: Any, header: Header) -> Claim:
    """The claim of schedule buffers among a file's weights; none unless they end at zero SNR.

    Raises:
        OSError: the file cannot be read.
    """
    for name, (end, near) in _TERMINAL.items():
        for key in (name, f"model.{name}"):
            if len(header.shapes.get(key, ())) == 1 and header.shapes[key][0] > 1:
                with safe_open(path, framework="pt") as file:
                    last = float(file.get_tensor(key)[-1])
                if abs(last - end) < near:
                    return Claim(f"buffer {key}", rescale_betas_zero_snr=True)
    return Claim("buffers")


def original_config_path(path: Any) -> Path:
    """Path of the `.yaml` that users of AUTOMATIC1111 and ComfyUI keep next to a checkpoint."""
    return Path(path).with_suffix(".yaml")


def original_config_claim(config: Any) -> Claim:
    """The claim of a checkpoint's original config: CompVis' `parameterization`, or the scaling of Stability AI's.

    Args:
        config: the path of its YAML file, or its content.

    Raises:
        OSError: the file does not exist.
        ValueError: not YAML, or not a model's config.
    """
    name = "original_config"
    if isinstance(config, str | os.PathLike):
        name = os.fspath(config)
        if not Path(name).is_file():
            raise FileNotFoundError(f"No such file: {name}. For a URL, download the file and pass its path.")
        try:
            config = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error
    parameters = _nested_value(config, "model", "params")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{name} is not an original model config: it has no model.params.")
    denoiser = _nested_value(parameters, "denoiser_config", "params")
    scaling = _nested_value(denoiser, "scaling_config", "target")
    levels = str(_nested_value(denoiser, "discretization_config", "target"))
    said = parse_prediction_type(parameters.get("parameterization")) or _SCALINGS.get(str(scaling).rpartition(".")[2])
    switches = [value for key in _ZERO_SNR if (value := _parse_flag(parameters.get(key))) is not None]
    return Claim(name, said, True if "ZeroSNR" in levels else next(iter(switches), None))


def _nested_value(config: Any, *keys: str) -> Any:
    """The value under nested keys of a parsed YAML config, None if one is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config

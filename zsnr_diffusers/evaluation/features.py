"""Feature networks for image metrics, with a common interface.

Metrics are comparable only if network, weights and resize are the same, so each network reports all three.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..utils.hashing import file_sha256, state_sha256
from .feature_statistics import FeatureOrigin
from .resize import resize_like_pillow, resize_like_tensorflow1

if TYPE_CHECKING:
    import torch

    FeaturesAndLogits: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Hash of NVIDIA's `inception-2015-12-05.pt` for StyleGAN; k-diffusion uses the same."""

INCEPTION_2015 = FeatureOrigin("inception-2015-12-05", "TensorFlow 1 bilinear to 299", INCEPTION_SHA256)
"""The origin of features for FID, KID and Inception Score; metrics with other networks have other names."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetwork(Protocol):
    """Interface of a feature network."""

    @property
    def origin(self) -> FeatureOrigin:
        """Name, resize and hash of the network, on which metrics depend."""

    @property
    def size(self) -> int | None:
        """The side in pixels to which the network resizes images; None if it does not resize."""

    def __call__(self, images: torch.Tensor) -> FeaturesAndLogits:
        """Features [n, d] and logits [n, classes], None without a classifier, of uint8 images [n, 3, h, w]."""


class InceptionFeatures:
    """The network of FID and Inception Score: Inception of 2015-12-05, as TorchScript.

    The file is `inception-2015-12-05.pt` from StyleGAN (NVIDIA's `metrics` folder; clean-fid and others use the same
    file). Features [n, 2048] are from the last pooling layer, logits [n, 1008] exclude the bias of the last layer, as
    in Salimans et al. 2016. Images are resized as in TensorFlow 1, which the papers' values are based on.

    Args:
        path: of the file.
        sha256: required hash of the file; None accepts any network with the same modules (`layers`, which takes (x -
            128) / 128 at 299 x 299, and a linear `output`).
        device: of the network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file with another hash or format.
    """

    size = 299

    def __init__(
        self, path: str | PathLike[str], sha256: str | None = INCEPTION_SHA256, device: str | torch.device = "cpu"
    ):
        found = file_sha256(path)
        if sha256 is not None and found != sha256.lower():
            raise ValueError(
                f"{str(path)!r} has sha256 {found}, expected {sha256}; download inception-2015-12-05.pt again, or "
                "pass the hash of the intended file (metrics of different networks are not comparable)"
            )
        self._network = _load_torchscript(path, device)
        self._device = device
        known = found == INCEPTION_SHA256
        name = INCEPTION_2015.network if known else "other inception"
        self.origin = FeatureOrigin(name, INCEPTION_2015.resize, found)

    def __call__(self, images: torch.Tensor) -> FeaturesAndLogits:
        """Features [n, 2048] and logits [n, 1008], float32, of uint8 images [n, 3, h, w]."""
        import torch

        with torch.inference_mode(), _without_tf32():
            resized = resize_like_tensorflow1(images.to(self._device), self.size)
            # The file's own forward also resizes, and returns either features or probabilities, so both would need two
            # passes.
            features = self._network.layers((resized - 128) / 128).flatten(1)
            return features, features @ self._network.output.weight.T


class DinoV2Features:
    """DINOv2's class token, after the last normalization: FD-DINOv2 of Stein et al. 2023 (arXiv:2306.04675).

    The paper uses `facebook/dinov2-large`. Preprocessing follows its code: Pillow's bicubic resize to `size`, rounded
    to 8 bits, ignoring the aspect ratio; then ImageNet's mean and standard deviation.

    Args:
        model: a folder or a Hub id with `config.json` and `model.safetensors`, for transformers' `Dinov2Model`.
        sha256: required hash of `model.safetensors`; None accepts any.
        size: side in pixels, a multiple of the patch size; 224 in the paper.
        device: of the network.
        kwargs: for `from_pretrained`, such as `revision` and `local_files_only`.

    Raises:
        OSError: the folder or repo, or a file in it, does not exist.
        ValueError: another kind of model, incompatible weights or another hash, or a size that is not a multiple of
            the patch size.
    """

    def __init__(
        self,
        model: str | PathLike[str] = "facebook/dinov2-large",
        sha256: str | None = None,
        size: int = 224,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ):
        from transformers.utils import cached_file

        self._network = _load_dinov2(str(model), device, kwargs)
        patch = self._network.config.patch_size
        if size % patch:
            raise ValueError(f"size {size} is not a multiple of the patch size {patch} of {str(model)!r}")
        found = file_sha256(cached_file(str(model), "model.safetensors", **kwargs))
        if sha256 is not None and found != sha256.lower():
            raise ValueError(f"model.safetensors of {str(model)!r} has sha256 {found}, expected {sha256}")
        self.size = size
        self._device = device
        self.origin = FeatureOrigin(f"dinov2 {Path(str(model)).name}", f"Pillow bicubic to {size}", found)

    def __call__(self, images: torch.Tensor) -> FeaturesAndLogits:
        """Features [n, hidden size], float32, of uint8 images [n, 3, h, w]; no logits."""
        import torch

        resized = resize_like_pillow(images, self.size).to(self._device)
        mean, std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.inference_mode(), _without_tf32():
            return self._network((resized.float() / 255 - mean) / std).pooler_output.float(), None


class CustomFeatures:
    """Any function from uint8 images [n, 3, h, w] to features, or to features and logits.

    Args:
        function: returns features [n, d], or the pair (features, logits [n, classes]), including any resize.
        name: of the network, printed next to every metric.
        resize: description of the function's resize.
        sha256: of its weights; by default that of `function`'s state if it is a `torch.nn.Module`.
        size: side in pixels after its resize.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Any],
        name: str,
        resize: str = "none",
        sha256: str | None = None,
        size: int | None = None,
    ):
        self._function = function
        self.size = size
        self.origin = FeatureOrigin(name, resize, state_sha256(function) if sha256 is None else sha256)

    def __call__(self, images: torch.Tensor) -> FeaturesAndLogits:
        """The result of the function, without gradients."""
        import torch

        with torch.inference_mode():
            outputs = self._function(images)
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        return features, logits


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 inside the block, with which convolutions on a GPU round to 10 bits by default."""
    import torch

    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _load_torchscript(path: str | PathLike[str], device: str | torch.device) -> Any:
    """Load the 2015 Inception network from a TorchScript file, and check that it has the required modules."""
    import torch

    with warnings.catch_warnings():
        # Writing TorchScript is deprecated; existing files remain in use.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        try:
            network: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{str(path)!r} is not a TorchScript file ({reason}); use inception-2015-12-05.pt, not "
                "torch-fidelity's .pth or a pickle"
            ) from error
    weight = getattr(getattr(network, "output", None), "weight", None)
    if weight is None or not hasattr(network, "layers"):
        raise ValueError(f"{str(path)!r} has no modules `layers` and `output`; it is not inception-2015-12-05.pt")
    return network.eval()


def _load_dinov2(model: str, device: str | torch.device, kwargs: dict[str, Any]) -> Any:
    """Load transformers' `Dinov2Model` from a folder or Hub id, and check that no weights are missing."""
    from transformers import AutoConfig, Dinov2Model

    kind = AutoConfig.from_pretrained(model, **kwargs).model_type
    if kind != "dinov2":
        raise ValueError(f"{model!r} is a {kind!r} model; pass one of type 'dinov2', such as facebook/dinov2-large")
    network, report = Dinov2Model.from_pretrained(model, use_safetensors=True, output_loading_info=True, **kwargs)
    if missing := report["missing_keys"]:
        raise ValueError(f"the weights of {model!r} lack {sorted(missing)[:3]} ({len(missing)} in total)")
    return network.eval().requires_grad_(False).to(device)

"""Networks whose features say how alike images are, behind one interface.

Figures compare only where the network, its weights and the resize are the same, so each network names all three.
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
"""Of `inception-2015-12-05.pt` as NVIDIA serves it for StyleGAN; k-diffusion pins the same."""

INCEPTION_2015 = FeatureOrigin("inception-2015-12-05", "TensorFlow 1 bilinear to 299", INCEPTION_SHA256)
"""What FID, KID and Inception Score are made by; figures by anything else have other names."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetwork(Protocol):
    """What computes features of images."""

    @property
    def origin(self) -> FeatureOrigin:
        """Name, resize and hash of the network, which figures depend on."""

    @property
    def size(self) -> int | None:
        """The side in pixels to which the network brings images itself, None where it takes them as they are."""

    def __call__(self, images: torch.Tensor) -> FeaturesAndLogits:
        """Features [n, d] and logits [n, classes], None without a classifier, of uint8 images [n, 3, h, w]."""


class InceptionFeatures:
    """The network of FID and Inception Score: Inception of 2015-12-05, as TorchScript.

    The file is `inception-2015-12-05.pt` of StyleGAN (NVIDIA's `metrics` folder; clean-fid and others fetch the same).
    Features [n, 2048] are its last pooling, logits [n, 1008] are without the bias of the last layer, as in Salimans et
    al. 2016. Images are resized as TensorFlow 1 did, which the papers' figures rest on.

    Args:
        path: of the file.
        sha256: that the file must have; None accepts any network with the same parts (`layers`, which takes
            (x - 128) / 128 at 299 x 299, and a linear `output`).
        device: where it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another hash or kind.
    """

    size = 299

    def __init__(
        self, path: str | PathLike[str], sha256: str | None = INCEPTION_SHA256, device: str | torch.device = "cpu"
    ):
        found = file_sha256(path)
        if sha256 is not None and found != sha256.lower():
            raise ValueError(
                f"{str(path)!r} has sha256 {found}, expected {sha256}; fetch inception-2015-12-05.pt again, or pass "
                "the hash of the file that is meant (figures of other networks do not compare)"
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
            # The file's own forward resizes too, and returns either features or probabilities: two passes for both.
            features = self._network.layers((resized - 128) / 128).flatten(1)
            return features, features @ self._network.output.weight.T


class DinoV2Features:
    """DINOv2's class token, after the last normalisation: FD-DINOv2 of Stein et al. 2023 (arXiv:2306.04675).

    The paper's figures are of `facebook/dinov2-large`. Preprocessing is its code's: Pillow's bicubic resize to `size`,
    rounded to 8 bits, whatever the shape; then ImageNet's mean and standard deviation.

    Args:
        model: a folder or a Hub id with `config.json` and `model.safetensors`, for transformers' `Dinov2Model`.
        sha256: that `model.safetensors` must have; None accepts any.
        size: side in pixels, a multiple of the patch size; 224 in the paper.
        device: where it runs.
        kwargs: for `from_pretrained`, such as `revision` and `local_files_only`.

    Raises:
        OSError: no such folder or repository, or a file is missing there.
        ValueError: another kind of model, weights that do not fit or of another hash, or a size that does not divide.
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
            raise ValueError(f"size {size} is no multiple of the patch size {patch} of {str(model)!r}")
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
        function: returns features [n, d], or the pair (features, logits [n, classes]); resizes by itself.
        name: of the network, written beside every figure.
        resize: how the function brings images to its size, in words.
        sha256: of its weights; by default that of `function`'s state if it is a `torch.nn.Module`.
        size: the side that it resizes to.
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
        """What the function returns, without gradients."""
        import torch

        with torch.inference_mode():
            outputs = self._function(images)
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        return features, logits


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Switch TF32 off inside the block, by which convolutions on a GPU round to 10 bits by default."""
    import torch

    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _load_torchscript(path: str | PathLike[str], device: str | torch.device) -> Any:
    """Load the 2015 Inception network from a TorchScript file, and check that it has the parts used here."""
    import torch

    with warnings.catch_warnings():
        # TorchScript is deprecated as a thing to write; files of it stay what they are.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        try:
            network: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{str(path)!r} is no TorchScript file ({reason}); torch-fidelity's .pth and pickles are others, take "
                "inception-2015-12-05.pt"
            ) from error
    weight = getattr(getattr(network, "output", None), "weight", None)
    if weight is None or not hasattr(network, "layers"):
        raise ValueError(f"{str(path)!r} has no parts `layers` and `output`; it is not inception-2015-12-05.pt")
    return network.eval()


def _load_dinov2(model: str, device: str | torch.device, kwargs: dict[str, Any]) -> Any:
    """Load transformers' `Dinov2Model` from a folder or Hub id, and check that no weights are missing."""
    from transformers import AutoConfig, Dinov2Model

    kind = AutoConfig.from_pretrained(model, **kwargs).model_type
    if kind != "dinov2":
        raise ValueError(f"{model!r} is a {kind!r} model; name one of kind 'dinov2', such as facebook/dinov2-large")
    network, report = Dinov2Model.from_pretrained(model, use_safetensors=True, output_loading_info=True, **kwargs)
    if missing := report["missing_keys"]:
        raise ValueError(f"the weights of {model!r} lack {sorted(missing)[:3]} ({len(missing)} in all)")
    return network.eval().requires_grad_(False).to(device)

"""A small classifier as a feature network, for images for which Inception and DINOv2 are not suitable.

It is trained in a minute on the real images and stored in a safetensors file of about 100 kB, with its architecture in
the metadata. Its metrics are comparable only for the same file hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import import_extra
from ..utils.files import atomic_write
from ..utils.hashing import file_sha256
from .feature_statistics import FeatureOrigin
from .resize import resize_like_pillow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .features import FeaturesAndLogits

FILE_FORMAT = "zsnr_diffusers classifier 1"
STRIDES = (1, 2, 2, 2)
WIDTHS = (16, 24, 32, 32)
NUM_FEATURES = 64


class ClassifierFeatures:
    """The last hidden layer of a classifier that `train_classifier` wrote, [n, 64] by default.

    Args:
        path: of the file.
        sha256: required hash of the file; None accepts any.
        device: of the network.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file with another hash or format, or damaged.
    """

    def __init__(self, path: str | PathLike[str], sha256: str | None = None, device: str | torch.device = "cpu"):
        found = file_sha256(path)
        if sha256 is not None and found != sha256.lower():
            raise ValueError(
                f"{str(path)!r} has sha256 {found}, expected {sha256}; download the file again, or pass the hash of "
                "the intended file (metrics of different classifiers are not comparable)"
            )
        self._tensors, facts = _read(path)
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        self._strides: list[int] = facts["strides"]
        self._device = device
        self.size: int = facts["size"]
        self.origin = FeatureOrigin(f"classifier {facts['name']}", f"Pillow bicubic to {self.size}", found)

    def __call__(self, images: Tensor) -> FeaturesAndLogits:
        """Features [n, d] and logits [n, classes], float32, of uint8 images [n, 3, h, w]."""
        import torch

        with torch.inference_mode():
            return classify(self._tensors, self._strides, resize_like_pillow(images, self.size).to(self._device))


def classify(tensors: Mapping[str, Tensor], strides: Sequence[int], images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, d] and logits [n, classes] of images [n, c, h, w] with values from 0 to 255.

    3 x 3 convolutions with ReLU, a dense layer with ReLU, whose outputs are the features, and a dense layer. A
    classifier for gray images uses the mean of the channels.
    """
    import torch.nn.functional as F

    hidden = images.float() / 127.5 - 1
    if tensors["conv.0.weight"].shape[1] == 1:
        hidden = hidden.mean(dim=1, keepdim=True)
    for i, stride in enumerate(strides):
        hidden = F.relu(F.conv2d(hidden, tensors[f"conv.{i}.weight"], tensors[f"conv.{i}.bias"], stride, padding=1))
    features = F.relu(F.linear(hidden.flatten(1), tensors["features.weight"], tensors["features.bias"]))
    return features, F.linear(features, tensors["logits.weight"], tensors["logits.bias"])


def train_classifier(
    images: Tensor,
    labels: Tensor,
    path: str | PathLike[str],
    name: str,
    *,
    epochs: int = 4,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    noise: float = 12.8,
    seed: int = 0,
) -> str:
    """Train a classifier with Adam and cross-entropy, and write it to a file.

    Args:
        images: uint8 [n, c, h, h], c 1 or 3.
        labels: int64 [n], from 0.
        path: of the safetensors file.
        name: printed next to every metric.
        epochs: over all images.
        batch_size: images per step.
        learning_rate: initial value, with cosine decay to 0.
        noise: standard deviation of Gaussian noise on the training images, out of 255, so that features are useful for
            imperfect images.
        seed: of the initial weights, the order and the noise.

    Returns:
        The sha256 of the file, for `ClassifierFeatures`.

    Raises:
        ValueError: images that are not uint8 and square, or a different number of labels.
    """
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    _check_training_set(images, labels)
    draw = torch.Generator().manual_seed(seed)
    tensors = _first_tensors(images.shape[1], images.shape[-1], int(labels.max()) + 1, draw)
    optimizer = torch.optim.Adam(tensors.values(), learning_rate)
    steps = epochs * (len(images) // batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with import_extra("tqdm").tqdm(total=steps, desc=f"training the classifier {name}", disable=None) as bar:
        for _ in range(epochs):
            for batch in _batches(len(images), batch_size, draw):
                pixels = images[batch].float()
                noisy = pixels + noise * torch.randn(pixels.shape, generator=draw)
                loss = F.cross_entropy(classify(tensors, STRIDES, noisy)[1], labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                decay.step()
                bar.update()
    facts = {"name": name, "size": images.shape[-1], "strides": STRIDES}
    with atomic_write(Path(path)) as partial:
        # One entry, since safetensors does not keep the order of several, and equal training should give equal hashes.
        metadata = {FILE_FORMAT: json.dumps(facts, sort_keys=True)}
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial, metadata)
    return file_sha256(path)


def _batches(n: int, batch_size: int, draw: torch.Generator) -> list[Tensor]:
    """Numbers of n images in random order, in whole batches."""
    import torch

    order = torch.randperm(n, generator=draw)
    return [order[start : start + batch_size] for start in range(0, n - batch_size + 1, batch_size)]


def _first_tensors(channels: int, size: int, classes: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Weights by He et al. 2015 (arXiv:1502.01852), for ReLU, and biases of zero; all require gradients."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        shapes[f"conv.{i}"] = (width, channels, 3, 3)
        channels, size = width, -(-size // stride)
    shapes["features"] = (NUM_FEATURES, channels * size**2)
    shapes["logits"] = (classes, NUM_FEATURES)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        tensors[f"{name}.weight"] = torch.randn(shape, generator=draw) * (2 / fan_in) ** 0.5
        tensors[f"{name}.bias"] = torch.zeros(shape[0])
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _check_training_set(images: Tensor, labels: Tensor) -> None:
    """Refuse images that are not uint8 [n, 1 or 3, h, h], and a different number of labels."""
    import torch

    shape = list(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise ValueError(f"expected uint8 images of shape [n, 1 or 3, h, h], got {images.dtype} {shape}")
    if labels.shape != (shape[0],):
        raise ValueError(f"expected a label per image, got {list(labels.shape)} for {shape[0]} images")


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a classifier's tensors and architecture from its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read as safetensors ({error}); download it again") from error
    if FILE_FORMAT not in metadata:
        raise ValueError(f"{str(path)!r} is not an image classifier; pass a file written by train_classifier")
    return tensors, json.loads(metadata[FILE_FORMAT])

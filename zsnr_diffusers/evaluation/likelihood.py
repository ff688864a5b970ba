"""Bits per dimension of a pixel-space model: the variational bound reported by Ho et al. 2020.

See `zsnr_diffusers.core.likelihood` for the terms and the effect of zero terminal SNR.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..utils.extras import import_extra
from ..utils.tables import Part, Report, Text
from .extraction import Images, uint8_batches
from .invariance import eval_mode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BitsPerDim(Report):
    """A bound on the negative log-likelihood of images, in bits per pixel and channel.

    Attributes:
        total: the bound, `prior` plus all terms. (An estimate if timesteps were sampled.)
        standard_error: of `total`, from the variation between images; NaN for one image.
        prior: information about an image that remains at the last timestep; exactly 0 at zero terminal SNR.
        terms: float64 [T], contribution of each timestep: at 0 the decoder, at t the step from t to t - 1. Means over
            the images that visited it; NaN if none did.
        n: number of images.
        variance_type: of the reverse steps; it affects the result.
    """

    total: float
    standard_error: float
    prior: float
    terms: npt.NDArray[np.float64]
    n: int
    variance_type: str

    @property
    def decoder(self) -> float:
        """Bits/dim of the last step, to a discrete image: the paper's distortion (its rate is the rest)."""
        return float(self.terms[0])

    @property
    def steps(self) -> float:
        """Bits/dim of all reverse steps between timesteps."""
        return self.total - self.prior - self.decoder

    def __repr__(self) -> str:
        return str(self)

    def parts(self) -> Iterator[Part]:
        """One line."""
        yield Text(
            f"bits/dim: at most {self.total:.4f} ± {self.standard_error:.4f} over {self.n} images (prior "
            f"{self.prior:.4f}, steps {self.steps:.4f}, decoder {self.decoder:.4f}; {self.variance_type})"
        )


def bits_per_dim(
    unet: Any,
    scheduler: Any,
    images: Images,
    class_labels: int | Sequence[int] | Tensor | None = None,
    *,
    timesteps_per_image: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> BitsPerDim:
    """The variational bound on the negative log-likelihood of images (Ho et al. 2020, arXiv:2006.11239, eq. 5).

    Over every step of the training schedule, with x_0 as the scheduler computes it from the network. The paper reports
    3.75 on CIFAR10's test set, with `variance_type="fixed_large"` and `clip_sample=True`.

    All T terms cost T network evaluations per image. With an int k, k terms are evaluated: the decoder's timestep for
    every image, and one drawn uniformly from each of k - 1 strata of neighboring timesteps (`core.bound_strata`),
    weighted by the stratum's size. This is unbiased for every k, and `standard_error` includes the sampling error.

    Args:
        unet: a `UNet2DModel` of images in [-1, 1], with or without class embeddings.
        scheduler: a scheduler of this package, for schedule, prediction type and clipping. The reverse steps use the
            `variance_type` of a `ZeroSNRDDPMScheduler`, and `fixed_small` for others.
        images: uint8 [n, C, H, W], or a folder or an iterable of paths or PIL images, as in `image_features`;
            converted to gray for a network with one channel.
        class_labels: one per image, or one for all; None for no class, the last embedding of a network with classes.
        timesteps_per_image: k, from 2 to T; None for all.
        batch_size: images per call of the network; each has its own timestep.
        seed: together with an image's index, determines its timesteps and noise, independent of the batch size.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: an unsupported network or scheduler, images with a wrong size or dtype, no images, invalid labels,
            or k out of range. (An epsilon model at zero terminal SNR has no bound; its scheduler refuses it.)
        ImageError: a file that cannot be read.
    """
    import torch

    from ..core import bound_strata, prior_kl

    _check_model(unet, scheduler)
    levels = _noise_levels(scheduler)
    if batch_size < 1 or seed < 0:
        raise ValueError(
            f"batch_size must be at least 1 and seed at least 0, got batch_size={batch_size}, seed={seed}"
        )
    strata = bound_strata(levels, _resolve_timesteps_per_image(timesteps_per_image, len(levels)))
    pictures = _load_images(unet, images, batch_size)
    labels = _resolve_labels(unet, class_labels, len(pictures))
    bound = _Bound(unet, scheduler, levels)

    size_of = torch.tensor([len(stratum) for stratum in strata for _ in stratum], dtype=torch.float64)
    sums, visits = torch.zeros(2, len(levels), dtype=torch.float64)
    totals = torch.cat(
        [_mean_per_image(prior_kl(_to_model_range(batch), levels[-1])) for batch in torch.split(pictures, batch_size)]
    )
    prior = totals.mean()
    with torch.inference_mode(), eval_mode(unet):
        for image, t, noise in _term_batches(pictures, strata, seed, batch_size, progress):
            terms = bound.bound_terms(pictures[image], noise, t, None if labels is None else labels[image])
            totals.index_add_(0, image, size_of[t] * terms)
            sums.index_add_(0, t, terms)
            visits.index_add_(0, t, torch.ones_like(terms))
    bits = 1 / math.log(2)
    return BitsPerDim(
        total=float(totals.mean()) * bits,
        standard_error=float(totals.std() if len(totals) > 1 else math.nan) / math.sqrt(len(totals)) * bits,
        prior=float(prior) * bits,
        terms=(sums / visits).numpy() * bits,
        n=len(pictures),
        variance_type=bound.variance_type,
    )


class _Bound:
    """The terms of one model, in float64 except for the network call, on the network's device."""

    def __init__(self, unet: Any, scheduler: Any, levels: list[Any]) -> None:
        import torch

        from ..core import decoder_std, step_kl_factors

        self.unet, self.scheduler = unet, scheduler
        self.device = torch.device("cpu") if unet.device.type == "mps" else unet.device  # Apple's GPUs have no float64
        self.variance_type = scheduler.config.get("variance_type", "fixed_small")
        self.decoder_std = decoder_std(levels[0], levels[1])
        steps = [step_kl_factors(now, following, self.variance_type) for following, now in pairwise(levels)]
        table = torch.tensor([(math.nan, math.nan), *steps], dtype=torch.float64)  # timestep 0 has none
        self.offset, self.weight = table.T.reshape(2, -1, 1, 1, 1).to(self.device)

    def bound_terms(self, pictures: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Term of the variational bound for each image at its timestep, shape [B], in nats per element, on the CPU."""
        from ..core import StepKL, discretized_log_likelihood, step_kl

        x_0, noise, t = _to_model_range(pictures.to(self.device)), noise.to(self.device).double(), t.to(self.device)
        prediction = self._predict_x_0(self.scheduler.add_noise(x_0, noise, t), t, labels)
        terms = _mean_per_image(step_kl(x_0, prediction, StepKL(self.offset[t], self.weight[t])))
        first = t == 0
        terms[first] = -_mean_per_image(discretized_log_likelihood(x_0[first], prediction[first], self.decoder_std))
        return terms.cpu()

    def _predict_x_0(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """x_0 as the scheduler computes it from the network's prediction, float64 [B, C, H, W]."""
        device, dtype = self.unet.device, self.unet.dtype
        condition = {} if labels is None else {"class_labels": labels.to(device)}
        output = self.unet(x_t.to(dtype).to(device), t.to(device), **condition).sample
        x_0: Tensor = self.scheduler.get_original_sample(output.to(self.device).double(), x_t, t)
        return x_0


def _to_model_range(pictures: Tensor) -> Tensor:
    """Convert uint8 images to float64 in [-1, 1]."""
    return pictures.double() / 127.5 - 1


def _mean_per_image(values: Tensor) -> Tensor:
    """Mean of terms of the bound over all elements of each image, shape [B]."""
    return values.flatten(1).mean(dim=1)


def _term_batches(
    pictures: Tensor, strata: list[range], seed: int, batch_size: int, progress: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of terms to evaluate: indices of images [B], their timesteps [B], and noise [B, C, H, W], float32."""
    import torch

    visits = _draw_timesteps_and_noise(len(pictures), tuple(pictures.shape[1:]), strata, seed)
    disable = None if progress else True  # None: only where the output is a terminal
    with import_extra("tqdm").tqdm(total=len(pictures) * len(strata), unit="term", disable=disable) as bar:
        while batch := list(islice(visits, batch_size)):
            places, timesteps, noises = zip(*batch, strict=True)
            yield torch.tensor(places), torch.tensor(timesteps), torch.from_numpy(np.stack(noises))
            bar.update(len(batch))


def _draw_timesteps_and_noise(
    n: int, shape: tuple[int, ...], strata: list[range], seed: int
) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
    """Yield for each of n images a timestep of each stratum and its noise, from the seed and the image's index."""
    starts, stops = zip(*((stratum.start, stratum.stop) for stratum in strata), strict=True)
    for place in range(n):
        random = np.random.default_rng((seed, place))
        for t in random.integers(starts, stops).tolist():
            yield place, t, random.standard_normal(shape, dtype=np.float32)


def _noise_levels(scheduler: Any) -> list[Any]:
    """Noise level of every timestep, as floats with float64 accuracy."""
    import torch

    from ..core import NoiseLevel

    tables = scheduler.noise_level(torch.arange(len(scheduler)), like=torch.zeros(1, dtype=torch.float64))
    return [*map(NoiseLevel, *(table.tolist() for table in tables))]


def _check_model(unet: Any, scheduler: Any) -> None:
    """Refuse schedulers that do not return x_0, and networks without 1 or 3 channels, for bits/dim."""
    if not hasattr(scheduler, "get_original_sample"):
        raise ValueError(
            f"{type(scheduler).__name__} is not a scheduler of this package: pass ZeroSNRDDPMScheduler.from_config("
            "scheduler.config), with rescale_betas_zero_snr=False if the model was not trained at zero terminal SNR"
        )
    if len(scheduler) < 2:
        raise ValueError("num_train_timesteps=1: the decoder takes its variance from the second timestep")
    channels, out_channels = unet.config.in_channels, unet.config.out_channels
    if channels not in (1, 3) or out_channels != channels:
        raise ValueError(
            f"{type(unet).__name__} goes from {channels} to {out_channels} channels; bits/dim is defined for "
            "pixel-space models, from 1 to 1 or from 3 to 3"
        )


def _resolve_timesteps_per_image(timesteps_per_image: int | None, num_train_timesteps: int) -> int:
    """Number of terms of the bound per image: `timesteps_per_image`, if in range, or all T."""
    if timesteps_per_image is None:
        return num_train_timesteps
    if not 2 <= timesteps_per_image <= num_train_timesteps:
        raise ValueError(
            f"timesteps_per_image={timesteps_per_image} must lie in [2, {num_train_timesteps}]: the decoder's and at "
            "least one more; None uses all"
        )
    return timesteps_per_image


def _load_images(unet: Any, images: Images, batch_size: int) -> Tensor:
    """All images as uint8 [n, C, H, W] on the CPU, loaded first so that errors are found early."""
    import torch

    batches, _ = uint8_batches(images, batch_size, unet.config.in_channels)
    listed = [batch.cpu() for batch in batches]
    if not listed:
        raise ValueError("no images: the iterable is empty")
    pictures = torch.cat(listed)
    size = unet.config.sample_size
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and tuple(pictures.shape[2:]) != tuple(wanted):
        height, width = pictures.shape[2:]
        raise ValueError(
            f"images are {width}x{height}; the network expects {wanted[1]}x{wanted[0]}: crop and resize them as in "
            "training"
        )
    return pictures


def _resolve_labels(unet: Any, class_labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
    """One class label per image, shape [n]; None for a network without classes."""
    import torch

    embeddings = getattr(unet.config, "num_class_embeds", None)
    if not embeddings:
        if class_labels is not None:
            raise ValueError("this network has no class embeddings (num_class_embeds): omit class_labels")
        return None
    none = embeddings - 1
    labels = torch.as_tensor(none if class_labels is None else class_labels, dtype=torch.long).cpu()
    if labels.ndim == 0:
        labels = labels.expand(n)
    if labels.shape != (n,):
        raise ValueError(
            f"class_labels has shape {list(labels.shape)} for {n} images; pass one per image, or one for all"
        )
    wrong = labels[(labels < 0) | (labels > none)]
    if len(wrong):
        raise ValueError(
            f"class_labels has {wrong[0].item()}; this network has 0 to {none - 1}, and {none} for no class"
        )
    return labels

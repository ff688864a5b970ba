"""Extract a LoRA from the difference between a retrained model and its base.

Nothing is trained. The best approximation of a matrix by one of rank r is its singular value decomposition cut to the
r largest values (Eckart & Young 1936, doi:10.1007/BF02288367), and a LoRA is a matrix of rank r for each layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.choices import check_guidance_rescale
from ..guidance.mixin import apply_guidance
from ..utils.extras import import_extra
from ..utils.tables import Part, Report, Table, Text
from .ldm_format import detect_pipeline_layout
from .load import load_pipeline
from .saved_model import SavedModel
from .weight_difference import WeightDifference, compare_pipelines
from .weight_files import stored_dtype

_ADAPTER = "default"


@dataclass(frozen=True)
class KeptShare:
    """How much of the difference between two models' weights a LoRA keeps, for one kind of weights in one network.

    Attributes:
        part: the network, by its name in the pipeline.
        kind: `linear`, `convolution`, `bias`, `norm`, `embedding` or `other`; a LoRA contains the first two.
        tensors: number of weights of this kind that differ.
        difference: squared Frobenius norm of their difference.
        kept: the part of `difference` that the stored LoRA reproduces.
    """

    part: str
    kind: str
    tensors: int
    difference: float
    kept: float


@dataclass(frozen=True)
class ExtractedLora(Report):
    """A pipeline of the base with the extracted LoRA in it, for `save_lora`, and how much of the difference it keeps.

    Attributes:
        pipeline: of the base, with scheduler and guidance of the retrained model.
        rank: of the LoRA; at most the number of rows or columns of a layer.
        shares: by network and kind of weights.
    """

    pipeline: Any
    rank: int
    shares: tuple[KeptShare, ...]

    @property
    def kept(self) -> float:
        """The fraction of the difference's squared norm that the LoRA keeps, from 0 to 1."""
        return sum(share.kept for share in self.shares) / sum(share.difference for share in self.shares)

    def parts(self) -> Iterator[Part]:
        """A table with a row for each kind of weights, and the overall fraction."""
        total = sum(share.difference for share in self.shares)
        rows = [
            (one.part, one.kind, str(one.tensors), f"{one.difference / total:.2%}", f"{one.kept / one.difference:.2%}")
            for one in self.shares
        ]
        head = ("network", "weights", "tensors", "of the difference", "kept")
        yield Table(head, tuple(rows), "<<>>>")
        yield Text(
            f"rank {self.rank} keeps {self.kept:.2%} of the difference (squared norm); a LoRA cannot contain biases, "
            "norms and embeddings"
        )


def extract_lora(
    retrained: Any,
    base: Any,
    rank: int = 32,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    guidance_rescale: float | None = None,
    keep_low_frequencies: int | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    config: Any = None,
    progress: bool = True,
    **kwargs: Any,
) -> ExtractedLora:
    """Extract the LoRA that best approximates the difference between a retrained model and its base.

    It covers the linear layers and convolutions of the UNet, and of the text encoders if they differ. `save_lora`
    writes it with the retrained model's schedule and guidance:

        save_lora(extract_lora("sd15-zsnr", "sd15", rank=64).pipeline, "sd15-zsnr-lora")

    Args:
        retrained: any source for `load_pipeline`: a folder, a Hub id, a `.safetensors` file, or a `SavedModel`.
        base: likewise; the model that `retrained` was trained from.
        rank: of the LoRA, at least 1; limited by a layer's number of rows or columns.
        dtype: of the LoRA's weights; by default that of the retrained model, or float32 if it has several or is on the
            Hub. Differences are decomposed in float64.
        device: device for the decomposition; not MPS, which has no float64.
        guidance_rescale: value to record instead of the retrained model's; 0 for none.
        keep_low_frequencies: likewise.
        prediction_type: of the retrained model, instead of the detected one.
        rescale_betas_zero_snr: likewise.
        config: for single files, a pipeline of their architecture; see `load_pipeline`.
        progress: show a progress bar on a terminal.
        kwargs: of `load_pipeline`, for both models.

    Returns:
        The base with the LoRA, and how much of the difference it keeps.

    Raises:
        ValueError: the models have different architectures or shapes, equal weights, or unrelated weights; weights
            that are not finite; a rank below 1 or above that of every layer; a device without float64; a retrained
            model without a recorded prediction type; and as in `load_pipeline`.
        OSError: a model was not found, or a Hub error.
        ImportError: peft is not installed.
    """
    check_guidance_rescale(guidance_rescale or 0.0)
    if rank < 1:
        raise ValueError(f"rank={rank}: the rank of a LoRA must be at least 1.")
    if torch.device(device).type == "mps":
        raise ValueError("device='mps' has no float64, which the decomposition needs: pass device='cpu'.")
    import_extra("peft", "lora")
    told: dict[str, Any] = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    trained, of_base = SavedModel.open(retrained, **told, **kwargs), SavedModel.open(base, **kwargs)
    _check_says_what_it_predicts(trained)
    source, target = _load_networks(trained, config), _load_networks(_for_its_weights(of_base), config)
    differences = compare_pipelines(source, target, (trained.name, of_base.name))
    _check_rank(rank, differences)
    shares = _add_adapters(target, differences, rank, dtype or stored_dtype(trained), device, progress)
    target.scheduler = source.scheduler
    apply_guidance(target, trained.guidance, guidance_rescale, keep_low_frequencies)
    return ExtractedLora(target, rank, shares)


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of a matrix by one of a rank, in the Frobenius and the spectral norm.

    Computed from the eigenvectors of the smaller Gram matrix, which takes a quarter of the time of a full
    decomposition of a large layer. This squares singular values; in float64 they are accurate down to 1e-8 of the
    largest, below the rounding of float32 weights.

    Args:
        matrix: float64 [m, n].
        rank: at most min(m, n).

    Returns:
        `up` [m, rank] and `down` [rank, n], whose product is the approximation. Singular values are in descending
        order, and both factors contain their square roots, so neither overflows half precision before the weights do.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = low_rank_factors(matrix.T, rank)
        return down.T, up.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    rows = vectors.T @ matrix
    strength = rows.norm(dim=1).sqrt()
    # a row with zero strength is zero already
    return vectors * strength, rows / strength.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None]


def _check_says_what_it_predicts(saved: SavedModel) -> None:
    """Refuse a single file without a recorded prediction type, since the LoRA would record a guess."""
    if saved.is_single_file and saved.prediction_type is None:
        raise ValueError(
            f"{saved.name} does not record its prediction type, which the LoRA would record: pass prediction_type= "
            "and rescale_betas_zero_snr= as it was trained."
        )


def _for_its_weights(saved: SavedModel) -> SavedModel:
    """The base, ignoring its recorded guidance and prediction type."""
    silent = saved.is_single_file and saved.prediction_type is None
    return replace(SavedModel.open(saved, prediction_type="epsilon") if silent else saved, guidance={})


def _load_networks(saved: SavedModel, config: Any) -> Any:
    """Load a saved pipeline in its stored dtype; refuse one that does not support a UNet LoRA."""
    options = {"config": config} if saved.is_single_file and config is not None else {}
    pipe = load_pipeline(saved, dtype=stored_dtype(saved), **options)
    if "unet" not in getattr(pipe, "_lora_loadable_modules", ()):
        raise ValueError(f"{saved.name} is a {type(pipe).__name__}, which is not a UNet pipeline with LoRA support.")
    detect_pipeline_layout(pipe)  # refuse what cannot be saved as a LoRA before the work starts
    return pipe


def _check_rank(rank: int, differences: Mapping[str, WeightDifference]) -> None:
    """Refuse a rank that no layer has."""
    largest = max(most for both in differences.values() for most in both.ranks().values())
    if rank > largest:
        raise ValueError(f"rank={rank} exceeds the rank of every layer of these networks, at most {largest}.")


def _add_adapters(
    pipe: Any,
    differences: Mapping[str, WeightDifference],
    rank: int,
    dtype: torch.dtype,
    device: str | torch.device,
    progress: bool,
) -> tuple[KeptShare, ...]:
    """Add the adapters that best approximate the differences to a pipeline's networks; returns what they keep."""
    total = sum(len(both.kinds) for both in differences.values())
    shares: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with import_extra("tqdm").tqdm(total=total, unit="weight", disable=None if progress else True) as bar:
        for part, both in differences.items():
            ranks = {name: min(rank, most) for name, most in both.ranks().items()}
            layers = _new_adapter(getattr(pipe, part), ranks, rank) if ranks else {}
            for name, kind in both.kinds.items():
                difference = both.of(name, device)
                squared = lost = float(difference.square().sum())
                if name in layers:
                    lost = _fill_adapter(layers[name], difference, ranks[name], dtype)
                shares.setdefault((part, kind), []).append((squared, squared - lost))
                bar.update()
    return tuple(KeptShare(*of, len(each), *map(sum, zip(*each, strict=True))) for of, each in shares.items())


def _new_adapter(network: Any, ranks: Mapping[str, int], rank: int) -> dict[str, nn.Module]:
    """Add an adapter with these ranks to a network; returns its layers by weight name."""
    layers = {name.removesuffix(".weight"): of for name, of in ranks.items()}
    small = {name: of for name, of in layers.items() if of != rank}
    config = import_extra("peft", "lora").LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(layers), rank_pattern=small, alpha_pattern=small
    )
    with torch.random.fork_rng(devices=[]):  # the initial weights are random, and replaced
        network.add_adapter(config, _ADAPTER)
    return {f"{name}.weight": network.get_submodule(name) for name in layers}


def _fill_adapter(layer: Any, difference: Tensor, rank: int, dtype: torch.dtype) -> float:
    """Set a layer's adapter to the best approximation of its rank; returns the squared error in the dtype."""
    matrix = difference.flatten(1)
    up, down = (factor.to(dtype) for factor in low_rank_factors(matrix, rank))
    error = float((matrix - up.double() @ down.double()).square().sum())
    for side, factor in ((layer.lora_A[_ADAPTER], down), (layer.lora_B[_ADAPTER], up)):
        side.weight = nn.Parameter(factor.reshape(side.weight.shape).cpu().contiguous(), requires_grad=False)
    return error

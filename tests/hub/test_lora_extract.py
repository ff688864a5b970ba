"""LoRAs that are extracted from the difference between two models."""

import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from published_models import networks
from safetensors.torch import load_file
from tiny_adapters import PHI, adapted, assert_paints_alike, needs_text_adapters
from tiny_checkpoints import EPSILON, KINDS, V, generate, says, sd_scheduler, tiny_pipeline, write_file
from tiny_pipelines import tiny_unconditional

from zsnr_diffusers import load_lora, load_pipeline, save_lora, save_pipeline
from zsnr_diffusers.hub import extract_lora
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_extract import low_rank_factors
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE

RANK = 3
"""Of `adapted`."""


def fused(kind, **changes):
    """A model that was retrained by a LoRA of `RANK`, as whole weights; its guidance rescale is recorded."""
    pipe = adapted(kind, **changes)
    pipe.fuse_lora(components=list(pipe.get_list_adapters()))
    pipe.unload_lora_weights()
    return pipe


def change(pipe, amount=0.01, among=lambda name: True):
    """Noise added to weights of a pipeline's UNet; returns it by name."""
    generator, noise = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if among(name):
                noise[name] = amount * torch.randn(weight.shape, generator=generator)
                weight += noise[name]
    return noise


@pytest.fixture
def retrained(tmp_path):
    """Saves a changed `tiny_pipeline` of 1.5; returns its folder and what `change` returns."""

    def save(prediction_type=V, **how):
        pipe = tiny_pipeline("1", sd_scheduler(prediction_type, prediction_type == V))
        noise = change(pipe, **how)
        pipe.save_pretrained(tmp_path / "retrained")
        return tmp_path / "retrained", noise

    return save


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9), (1, 5)])
def test_no_other_factors_of_a_rank_come_nearer(shape):
    """Eckart and Young: what is left are the other singular values."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        up, down = low_rank_factors(matrix, rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        left = torch.linalg.svdvals(matrix - up @ down)
        torch.testing.assert_close(left[: min(shape) - rank], values[rank:], rtol=1e-9, atol=1e-12)
        assert left[min(shape) - rank :].max() < 1e-12 * values[0]
        torch.testing.assert_close(up.norm(dim=0), values[:rank].sqrt(), rtol=1e-9, atol=0)
        torch.testing.assert_close(down.norm(dim=1), values[:rank].sqrt(), rtol=1e-9, atol=0)


def test_a_matrix_of_lower_rank_is_whole_and_nothing_is_nothing():
    generator = torch.Generator().manual_seed(0)
    thin = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 2), (2, 30))]
    for matrix in (1e-6 * thin[0] @ thin[1], torch.zeros(4, 6, dtype=torch.float64)):
        up, down = low_rank_factors(matrix, 4)
        assert torch.isfinite(up).all() and torch.isfinite(down).all()  # noqa: PT018  # of one pair
        torch.testing.assert_close(up @ down, matrix, rtol=0, atol=1e-12 * float(matrix.abs().max()))


def test_small_singular_values_beside_large_ones():
    """Down to the rounding of float32, in which weights are."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(n, 12, generator=generator, dtype=torch.float64)).Q for n in (12, 40)]
    values = torch.logspace(0, -9, 12, dtype=torch.float64)
    matrix = sides[0] * values @ sides[1].T
    for rank in range(1, 12):
        up, down = low_rank_factors(matrix, rank)
        assert torch.linalg.norm(matrix - up @ down) < 1.001 * values[rank:].norm() + 1e-8


def test_a_lora_comes_back_from_its_weights(configs, tmp_path):
    """What trained a model is found in it again, and is read by everyone."""
    pipe = fused("1")
    save_pipeline(pipe, tmp_path / "retrained")
    state = torch.get_rng_state()
    extracted = extract_lora(tmp_path / "retrained", configs["1"], RANK)
    assert torch.equal(torch.get_rng_state(), state)
    # of weights that were rounded to float32, 2^-24 of some 0.1, when a change of some 0.01 was added
    assert 1 - 1e-9 < extracted.kept <= 1
    folder = save_lora(extracted.pipeline, tmp_path / "lora")
    for file in (folder, folder / KOHYA_FILE):
        base = load_lora(tiny_pipeline("1"), file)
        assert says(base) == (V, True)
        assert base.default_guidance_rescale == PHI
        assert_paints_alike(base, pipe)
    stock = tiny_pipeline("1", EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"))
    stock.load_lora_weights(folder, weight_name=LORA_FILE)
    ours = generate(pipe, guidance_rescale=0.0)
    torch.testing.assert_close(generate(stock), ours, rtol=0, atol=1e-3 * ours.abs().max().item())


@pytest.mark.full
@pytest.mark.parametrize("form", ["folder", "file", "half", "half file"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_models_as_people_have_them(kind, form, configs, tmp_path):
    dtype = torch.float16 if "half" in form else torch.float32
    names = [tmp_path / f"{name}{'.safetensors' if 'file' in form else ''}" for name in ("base", "retrained")]
    retrained = fused(kind)
    for name, pipe in zip(names, (tiny_pipeline(kind), retrained), strict=True):
        save_pipeline(pipe.to(dtype), name)
    options = {"config": configs[kind]} if "file" in form else {}
    extracted = extract_lora(names[1], names[0], RANK, **options)
    folder = save_lora(extracted.pipeline, tmp_path / "lora")
    weights = load_file(folder / LORA_FILE)
    assert {value.dtype for value in weights.values()} == {dtype}
    base = load_lora(tiny_pipeline(kind).to(dtype).to(torch.float32), folder)
    assert says(base) == (V, True)
    retrained = retrained.to(torch.float32)
    if dtype == torch.float32:
        assert extracted.kept > 1 - 1e-9
        assert_paints_alike(base, retrained)
    else:
        # Half precision rounds a weight of 0.1 by up to 3e-5, and changes are some 0.01.
        assert extracted.kept > 0.999
        ours, theirs = generate(retrained), generate(base)
        assert (ours - theirs).abs().mean() < 0.02 * ours.abs().mean()


@pytest.mark.full
@needs_text_adapters
def test_text_encoders_that_differ_are_in_it(configs, tmp_path):
    pipe = fused("xl", texts=True)
    save_pipeline(pipe, tmp_path / "retrained")
    extracted = extract_lora(tmp_path / "retrained", configs["xl"], RANK)
    assert {share.part for share in extracted.shares} == {"unet", "text_encoder", "text_encoder_2"}
    assert extracted.kept > 1 - 1e-9
    base = load_lora(tiny_pipeline("xl"), save_lora(extracted.pipeline, tmp_path / "lora"))
    assert_paints_alike(base, pipe)


def test_the_share_that_is_kept(retrained, configs):
    """Of full-rank noise on everything, by kind: what is left of the singular values, and no biases and norms."""
    folder, noise = retrained()
    rank = 4
    extracted = extract_lora(folder, configs["1"], rank)
    shares = {share.kind: share for share in extracted.shares}
    assert set(shares) == {"linear", "convolution", "bias", "norm"}
    assert sum(share.tensors for share in shares.values()) == len(noise)
    assert shares["bias"].kept == shares["norm"].kept == 0
    for kind, sides in (("linear", 2), ("convolution", 4)):
        squares = [
            torch.linalg.svdvals(value.double().flatten(1)).square() for value in noise.values() if value.ndim == sides
        ]
        assert shares[kind].difference == pytest.approx(float(sum(one.sum() for one in squares)), rel=1e-4)
        assert shares[kind].kept == pytest.approx(float(sum(one[:rank].sum() for one in squares)), rel=1e-4)
    whole = sum(float(value.double().square().sum()) for value in noise.values())
    assert extracted.kept == pytest.approx(sum(share.kept for share in shares.values()) / whole, rel=1e-4)
    assert f"rank 4 keeps {extracted.kept:.2%} of the difference" in str(extracted)


@pytest.mark.full
def test_at_full_rank_only_biases_and_norms_are_lost(retrained, configs, tmp_path):
    folder, noise = retrained(among=lambda name: name.endswith("weight") and "norm" not in name)
    layers = {name: min(value.flatten(1).shape) for name, value in noise.items()}
    extracted = extract_lora(folder, configs["1"], max(layers.values()))
    assert extracted.kept > 1 - 1e-9
    file = save_lora(extracted.pipeline, tmp_path / "lora") / LORA_FILE
    shapes = {key.removeprefix("unet."): shape for key, shape in read_header(file).shapes.items()}
    for name, rank in layers.items():
        assert shapes[name.replace(".weight", ".lora_A.weight")][0] == rank
    whole = load_pipeline(folder)
    base = load_lora(tiny_pipeline("1", whole.scheduler), file)
    assert base.scheduler is whole.scheduler
    assert_paints_alike(base, whole)


def test_dtype_and_guidance_as_asked(retrained, configs, tmp_path):
    folder, _ = retrained(among=lambda name: "conv_in" in name)
    extracted = extract_lora(
        folder, configs["1"], 2, dtype=torch.bfloat16, guidance_rescale=0.3, keep_low_frequencies=2
    )
    file = save_lora(extracted.pipeline, tmp_path / "lora") / LORA_FILE
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    assert json.loads(read_header(file).metadata["zsnr_diffusers"])["_guidance_rescale"] == 0.3
    assert load_lora(tiny_pipeline("1"), file).default_keep_low_frequencies == 2


@pytest.mark.full
@pytest.mark.parametrize(("kind", "other"), [("1", "2"), ("xl", "1"), ("2", "xl")])
def test_other_architectures_are_refused(kind, other, configs, tmp_path):
    with pytest.raises(ValueError, match=r"architectures"):
        extract_lora(configs[kind], configs[other])


def test_what_is_no_difference_is_refused(retrained, configs, tmp_path):
    with pytest.raises(ValueError, match=r"UNets of .* are equal; there is nothing to extract"):
        extract_lora(configs["1"], configs["1"])
    folder, _ = retrained(amount=1.0)  # ten times the weights themselves
    with pytest.raises(ValueError, match=r"is not the base of .*retrained: the cosine .* is 0\.\d\d, but above 0.5"):
        extract_lora(folder, configs["1"])
    folder, _ = retrained(amount=float("nan"), among=lambda name: "conv_in" in name)
    with pytest.raises(ValueError, match=r"retrained: 2 weights of its unet are not finite \(conv_in.bias, conv_in"):
        extract_lora(folder, configs["1"])
    tiny_unconditional().save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"pixels is a DDIMPipeline, which is not a UNet pipeline with LoRA"):
        extract_lora(tmp_path / "pixels", configs["1"])


def test_ranks_that_no_layer_has_are_refused(retrained, configs):
    with pytest.raises(ValueError, match=r"rank=0: the rank of a LoRA must be at least 1"):
        extract_lora("anything", "else", 0)
    folder, _ = retrained(EPSILON, among=lambda name: name in ("conv_in.weight", "conv_out.weight"))
    base = tiny_pipeline("1").unet
    largest = max(min(base.conv_in.weight.flatten(1).shape), min(base.conv_out.weight.flatten(1).shape))
    with pytest.raises(
        ValueError, match=rf"rank={largest + 1} exceeds the rank of every layer .* at most {largest}\."
    ):
        extract_lora(folder, configs["1"], largest + 1)
    extracted = extract_lora(folder, configs["1"], largest)
    assert says(extracted.pipeline) == (EPSILON, False)
    assert extracted.kept > 1 - 1e-9
    assert not any("lora" in name for part in networks(tiny_pipeline("1")).values() for name in part.state_dict())


@pytest.mark.full
def test_a_file_that_does_not_say_what_it_predicts(configs, tmp_path):
    """The retrained one has to, the base need not."""
    silent = write_file(tmp_path / "base.safetensors", "2")
    pipe = fused("2")
    trained = save_pipeline(pipe, tmp_path / "trained.safetensors")
    with pytest.raises(
        ValueError, match=r"base.safetensors does not record its prediction type, .* pass prediction_type="
    ):
        extract_lora(silent, trained, RANK, config=configs["2"])
    extracted = extract_lora(trained, silent, RANK, config=configs["2"])
    assert says(extracted.pipeline) == (V, True)
    assert extracted.kept > 1 - 1e-9

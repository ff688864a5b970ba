"""Guidance that leaves the lowest frequencies to the conditional prediction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import NoiseLevel, converted_prediction, keep_low_frequencies, low_pass

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIDES = st.integers(1, 40)


def predictions(*shape, dtype=torch.float64, seed=0):
    """A guided and a conditional prediction."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(frequencies, sides):
    """The image [H, W] of one frequency by definition, of norm 1."""
    waves = [np.cos(np.pi * i * (np.arange(n) + 0.5) / n) for i, n in zip(frequencies, sides, strict=True)]
    image = torch.from_numpy(np.multiply.outer(*waves))
    return image / image.norm()


@given(height=SIDES, width=SIDES, k=st.integers(1, 45), seed=st.integers(0, 99))
def test_it_is_an_orthogonal_projection(height, width, k, seed):
    x, y = predictions(2, 3, height, width, seed=seed)
    low = low_pass(x, k)
    assert low.shape == x.shape
    torch.testing.assert_close(low_pass(low, k), low, rtol=0, atol=1e-12)  # float64 of sums of at most 1600 values
    left = (low * (y - low_pass(y, k))).sum((2, 3))
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-11)
    torch.testing.assert_close((low * y).sum((2, 3)), (x * low_pass(y, k)).sum((2, 3)), rtol=0, atol=1e-11)
    torch.testing.assert_close(low_pass(3 * x - y, k), 3 * low - low_pass(y, k), rtol=0, atol=1e-11)
    torch.testing.assert_close(low.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-13)


@given(sides=st.tuples(SIDES, SIDES), k=st.integers(1, 12), data=st.data())
def test_it_keeps_the_lowest_frequencies_and_no_other(sides, k, data):
    frequencies = [data.draw(st.integers(0, side - 1)) for side in sides]
    wave = cosine(frequencies, sides)
    expected = wave if max(frequencies) < k else torch.zeros_like(wave)
    torch.testing.assert_close(low_pass(wave[None, None], k)[0, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_of_0_returns_the_guided_prediction_itself(dtype):
    for shape in [(2, 4, 8, 8), (2, 64, 16), (2, 3)]:
        guided, conditional = predictions(*shape, dtype=dtype)
        assert keep_low_frequencies(guided, conditional, 0) is guided


@given(height=SIDES, width=SIDES, more=st.integers(0, 5), dtype=st.sampled_from(DTYPES))
def test_from_the_larger_side_on_the_result_is_the_conditional_prediction(height, width, more, dtype):
    guided, conditional = predictions(2, 4, height, width, dtype=dtype)
    assert torch.equal(keep_low_frequencies(guided, conditional, max(height, width) + more), conditional)


@given(k=st.integers(1, 20), dtype=st.sampled_from(DTYPES), height=SIDES, width=SIDES)
def test_the_mean_of_every_channel_is_that_of_the_conditional_prediction(k, dtype, height, width):
    guided, conditional = predictions(3, 2, height, width, dtype=dtype)
    kept = keep_low_frequencies(7 * guided, conditional, k)
    assert kept.dtype == dtype
    # Every value is rounded to the dtype, the largest of them near 30; the mean is at most as far off.
    tolerance = 32 * torch.finfo(dtype).eps
    means = kept.double().mean((2, 3)), conditional.double().mean((2, 3))
    torch.testing.assert_close(*means, rtol=0, atol=tolerance)


@given(k=st.integers(1, 7), seed=st.integers(0, 99))
def test_low_frequencies_are_the_conditional_s_and_the_others_the_guided_s(k, seed):
    guided, conditional = predictions(2, 4, 8, 8, seed=seed)
    kept = keep_low_frequencies(guided, conditional, k)
    torch.testing.assert_close(low_pass(kept, k), low_pass(conditional, k), rtol=0, atol=1e-12)
    torch.testing.assert_close(kept - low_pass(kept, k), guided - low_pass(guided, k), rtol=0, atol=1e-12)
    # so that to keep twice is to keep more
    twice = keep_low_frequencies(keep_low_frequencies(guided, conditional, 2), conditional, k)
    torch.testing.assert_close(twice, keep_low_frequencies(guided, conditional, max(2, k)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8, 8), (2, 4, 3, 8, 8), (6, 4, 8, 8)])
def test_every_frame_of_a_video_is_an_image_of_its_own(shape):
    guided, conditional = predictions(*shape)
    kept = keep_low_frequencies(guided, conditional, 3)
    flat = [x.reshape(-1, 1, 8, 8) for x in (guided, conditional, kept)]
    for g, c, expected in zip(*flat, strict=True):
        torch.testing.assert_close(keep_low_frequencies(g[None], c[None], 3)[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction", "epsilon"])
@given(alpha=st.floats(0, 0.99), k=st.integers(1, 8), guidance=st.floats(1, 15))
def test_the_image_that_is_meant_is_the_same_whatever_the_network_predicts(kind, alpha, k, guidance):
    level = NoiseLevel(alpha, math.sqrt(1 - alpha**2))
    x_t = predictions(2, 4, 8, 8, seed=1)[0]
    unconditional, conditional = predictions(2, 4, 8, 8)
    guided = unconditional + guidance * (conditional - unconditional)

    def as_output(x_0):
        return converted_prediction(x_0, x_t, level, "sample", kind, level)

    kept = keep_low_frequencies(as_output(guided), as_output(conditional), k)
    expected = as_output(keep_low_frequencies(guided, conditional, k))
    # Sums of 64 products in float64; sigma is at least 0.14, by which noise is divided.
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_half_precision_is_computed_in_float32(dtype):
    guided, conditional = predictions(2, 4, 16, 16, dtype=dtype)
    kept = keep_low_frequencies(guided, conditional, 4)
    exact = keep_low_frequencies(guided.double(), conditional.double(), 4)
    assert kept.dtype == dtype
    # rounded once, at the end; where it falls between two values, float32 may decide otherwise than float64
    torch.testing.assert_close(kept.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_single_precision_is_as_exact_for_many_frequencies_as_for_few():
    guided, conditional = predictions(1, 1, 128, 128)
    for k in (1, 4, 127):
        exact = keep_low_frequencies(guided, conditional, k)
        kept = keep_low_frequencies(guided.float(), conditional.float(), k)
        torch.testing.assert_close(kept.double(), exact, rtol=0, atol=5e-6)  # sums of 128 products of size 1, twice


def test_autocast_does_not_round():
    guided, conditional = predictions(2, 4, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kept = keep_low_frequencies(guided, conditional, 4)
    assert torch.equal(kept, keep_low_frequencies(guided, conditional, 4))


@pytest.mark.parametrize("k", [-1, 2.0, 1.5, True, "4", None, float("nan")])
def test_what_is_no_count_is_refused(k):
    guided, conditional = predictions(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"keep_low_frequencies=.* must be an integer of at least 0"):
        keep_low_frequencies(guided, conditional, k)


def test_integers_of_numpy_are_integers():
    guided, conditional = predictions(1, 4, 8, 8)
    assert torch.equal(
        keep_low_frequencies(guided, conditional, np.int64(2)), keep_low_frequencies(guided, conditional, 2)
    )


@pytest.mark.parametrize("shape", [(1, 4096, 64), (2, 8)])
def test_predictions_without_height_and_width_are_refused(shape):
    guided, conditional = predictions(*shape)
    with pytest.raises(ValueError, match=rf"keep_low_frequencies=4 needs .*got \[{shape[0]}, {shape[1]}.*tokens"):
        keep_low_frequencies(guided, conditional, 4)

"""How a pipeline guides, read off its result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core.combination import find_combination, find_combination_of_equals, guidance_weights


@given(
    weights=st.lists(st.floats(-8, 8), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_weights_are_found(weights, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(len(weights) + 1, 2, 4, 8, 8, generator=generator).to(dtype)
    weights = [1 - sum(weights), *weights]
    guided = sum(w * p.double() for w, p in zip(weights, predictions, strict=True)).to(dtype)
    found, explained = guidance_weights(guided, list(predictions))
    assert explained
    assert sum(found) == pytest.approx(1)
    tolerance = 4 * torch.finfo(dtype).eps * max(1, *map(abs, weights))
    assert found == pytest.approx(weights, abs=max(tolerance, 1e-6))


@pytest.mark.parametrize("shape", [(1, 5, 4, 8, 8), (2, 5, 8, 8), (3, 4, 7), (2, 40)])
def test_a_scale_of_its_own_for_each_frame(shape):
    u, c = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(1, 7, shape[1] if len(shape) > 2 else 1).reshape(1, -1, *[1] * (len(shape) - 2))
    (first, second), explained = guidance_weights(u + scales * (c - u), [u, c])
    assert explained
    assert second == pytest.approx(float(scales.mean()), abs=1e-4)
    assert first == pytest.approx(1 - second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_no_weighted_sum_is_not_explained(dtype):
    u, c = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    masked = u + 7.5 * (c - u) * (c > 0)
    assert guidance_weights(masked, [u, c])[1] is False
    assert guidance_weights(u + 7.5 * (c - u) + 0.5 * c.roll(1, -1), [u, c])[1] is False


def test_equal_predictions_tell_nothing():
    c = torch.randn(1, 4, 8, 8)
    assert guidance_weights(c, [c, c]) is None
    assert guidance_weights(c, [c * (1 + 1e-7), c]) is None
    assert guidance_weights(torch.zeros(1, 4, 8, 8), [torch.zeros(1, 4, 8, 8)] * 3) is None


def test_two_equal_predictions_beside_a_third_do_not_hide_the_conditional():
    """InstructPix2Pix where the image changes nothing."""
    u, c = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for image in (u, u * (1 + 1e-7), u + 1e-9):
        guided = u + 7.5 * (c - image) + 1.5 * (image - u)
        weights, explained = guidance_weights(guided, [c, image, u])
        assert explained
        assert weights[0] == pytest.approx(7.5, abs=1e-4)
        assert max(weights) == weights[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_that_were_mixed_with_the_sample_are_no_explanation(dtype):
    """As in the latent upscaler, which preconditions its predictions before it combines them."""
    u, c, x = torch.randn(3, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    guided = u + 7.5 * (c - u)
    assert guidance_weights(guided, [u, c], 100 * x)[1] is True
    assert guidance_weights(guided + 0.07 * x, [u, c], 100 * x)[1] is False


# Beyond a plain weighted sum

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def three(dtype, shape=(2, 6, 8, 8)):
    """Unconditional and conditional prediction, and a sample."""
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sign_of_a_sum_is_found(dtype):
    u, c, x = three(dtype)
    for sign in (1, -1):
        found = find_combination((sign * (u.double() + 4 * (c.double() - u.double()))).to(dtype), [u, c], x)
        assert (found.conditional, found.factor, found.of_sample) == (1, sign, 0)
        assert torch.equal(found.apply_to(c, x), sign * c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_goes_through_x_0_and_back_is_found(dtype):
    """As with the factors of EDM: x_0 = a x + b p for each prediction, then (x - x_0) / sigma of the guided one."""
    u, c, x = three(dtype)
    sigma, a, b = 2.0, 1 / 3, -2 / 3
    x_0 = [a * x.double() + b * p.double() for p in (u, c)]
    guided = ((x.double() - x_0[0] - 4 * (x_0[1] - x_0[0])) / sigma).to(dtype)
    found = find_combination(guided, [u, c], x)
    eps = torch.finfo(dtype).eps
    assert found.conditional == 1
    assert found.weights == pytest.approx((-3, 4), abs=8 * eps)
    assert found.factor == pytest.approx(-b / sigma, abs=4 * eps)
    assert found.of_sample == pytest.approx((1 - a) / sigma, abs=4 * eps)
    alone = ((x.double() - x_0[1]) / sigma).to(dtype)
    torch.testing.assert_close(found.apply_to(c, x), alone, rtol=8 * eps, atol=8 * eps)
    later = found.refit(2 * guided + x, [u, c], x)  # another step, with shares of its own
    assert later.weights == found.weights
    assert later.factor == pytest.approx(2 * found.factor, abs=16 * eps)
    assert later.of_sample == pytest.approx(2 * found.of_sample + 1, abs=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [(1, 2, 3), -1, 1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_length_that_is_set_is_found(batch, dim, dtype):
    """Of all of a sample, as in Z-Image; of every row, as in Qwen-Image; along another dimension, as in JoyImage."""
    u, c, x = three(dtype, (batch, 6, 8, 8))
    for sign in (1, -1):
        guided = u.double() + 4 * (c.double() - u.double())
        norms = [torch.linalg.vector_norm(p.double(), dim=dim, keepdim=True) for p in (c, guided)]
        found = find_combination((sign * guided * norms[0] / norms[1]).to(dtype), [u, c], x)
        assert (found.conditional, found.factor, found.of_sample) == (1, sign, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_form_of_a_sum_explains_is_left(dtype):
    u, c, x = three(dtype)
    guided = u + 4 * (c - u)
    for changed in (u + 4 * (c - u) * (c > 0), guided + 0.5 * c.roll(1, -1), guided * (x > 0), guided.clamp(-1, 1)):
        assert find_combination(changed, [u, c], x) is None


def test_predictions_that_hardly_differ_do_not_explain_all():
    """Of which the part that a pipeline hands on is not looked at: weights without a meaning, however large."""
    p, one, other, rest, x = torch.randn(5, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    alike = [p, p + 1e-5 * one, p + 1e-5 * other]
    assert find_combination(p + 0.05 * rest, alike, x) is None


def test_equal_predictions_have_a_sign():
    c = three(torch.float32)[1]
    assert find_combination_of_equals(c * (1 + 1e-7), c).factor == 1
    assert find_combination_of_equals(-c, c).factor == -1
    assert find_combination_of_equals(c.roll(1, -1), c) is None


def test_in_single_precision_predictions_mixed_with_the_sample_are_told_from_a_plain_combination():
    u, c, x = torch.randn(3, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, mixed = u + 7.5 * (c - u), 0.5 * (u + 7.5 * (c - u)) + 0.25 * x
    found = find_combination(plain, [u, c], x)
    assert (found.factor, found.of_sample) == (1.0, 0.0)
    assert found.apply_to(c, x) is c
    assert found.weights == pytest.approx((-6.5, 7.5), abs=1e-4)
    found = find_combination(mixed, [u, c], x)
    # float32's rounding of values up to 30, which the fit averages
    assert (found.factor, found.of_sample) == pytest.approx((0.5, 0.25), abs=1e-4)
    assert found.weights == pytest.approx((-6.5, 7.5), abs=1e-3)


def test_predictions_that_differ_far_less_than_they_are_large_are_explained_within_their_rounding():
    """Both sizes, of predictions and of their differences, count as root mean squares."""
    c = 100 + torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    u = c - 1e-2 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    weights, explained = guidance_weights(u + 7.5 * (c - u), [u, c])
    assert explained
    assert weights == pytest.approx([-6.5, 7.5], abs=0.05)
    near = c + 1e-6 * (c - u)
    assert guidance_weights(c, [c, near]) is None
    _, explained = guidance_weights(u + 7.5 * (c - u) + 1e-2 * torch.sin(40 * c), [u, c])
    assert not explained


@pytest.mark.parametrize("half", [0, 1])
def test_the_least_precise_dtype_says_what_is_equal(half):
    """A pipeline that computes in half precision what its network gives in single, or the reverse."""
    c = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    rounded = (c * (1 + 3e-3)).half().float()
    guided, prediction = (rounded.half(), c) if half == 0 else (rounded, c.half())
    assert find_combination_of_equals(guided, prediction) is not None
    assert find_combination_of_equals(rounded, c) is None

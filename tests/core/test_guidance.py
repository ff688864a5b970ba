import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import classifier_free_guidance, rescale_guidance


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    conditional = torch.randn(3, 4, 8, 8, generator=generator) * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
    unconditional = torch.randn(3, 4, 8, 8, generator=generator)
    return classifier_free_guidance(unconditional, conditional, 7.5).to(dtype), conditional.to(dtype)


def test_algorithm_2_at_full_strength_has_the_spread_of_the_conditional():
    guided, conditional = pair()
    rescaled = rescale_guidance(guided, conditional, 1.0)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-5, atol=0)
    direction = torch.nn.functional.cosine_similarity(rescaled.flatten(1), guided.flatten(1))
    torch.testing.assert_close(direction, torch.ones(3), rtol=1e-6, atol=0)


@given(st.floats(0.0, 1.0))
def test_algorithm_2_blends_linearly(phi):
    guided, conditional = pair(torch.float64)
    full = rescale_guidance(guided, conditional, 1.0)
    torch.testing.assert_close(
        rescale_guidance(guided, conditional, phi), phi * full + (1 - phi) * guided, rtol=1e-12, atol=1e-12
    )


def test_equal_to_stock():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = pair()
    stock = rescale_noise_cfg(guided, conditional, guidance_rescale=0.7)
    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.7), stock, rtol=1e-6, atol=1e-6)


def test_strength_zero_returns_the_very_tensor():
    guided, conditional = pair()
    assert rescale_guidance(guided, conditional, 0.0) is guided


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(
    value=st.floats(-50, 50).filter(lambda v: v == 0 or abs(v) > 1e-3),
    size=st.integers(1, 70),
    which=st.sampled_from(["guided", "conditional", "both"]),
)
def test_a_flat_prediction_is_left_unscaled(dtype, value, size, which):
    flat = torch.full((1, 3, size, size), value, dtype=dtype)
    wavy = torch.linspace(-1, 1, flat.numel()).reshape(flat.shape).to(dtype)
    guided = flat if which != "conditional" else wavy
    conditional = flat if which != "guided" else wavy
    assert torch.equal(rescale_guidance(guided, conditional, 0.7), guided)


def test_a_flat_sample_does_not_touch_its_neighbours():
    guided, conditional = pair()
    guided[1], conditional[1] = 0.3, 0.2
    rescaled = rescale_guidance(guided, conditional, 0.7)
    assert torch.equal(rescaled[1], guided[1])
    assert torch.equal(rescaled[::2], rescale_guidance(guided[::2], conditional[::2], 0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    guided, conditional = pair(dtype)
    exact = rescale_guidance(guided.double(), conditional.double(), 0.7)
    result = rescale_guidance(guided, conditional, 0.7)
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("phi", [-0.1, 1.5, float("nan")])
def test_strength_outside_the_unit_interval_is_refused(phi):
    with pytest.raises(ValueError, match=r"guidance_rescale=.* must lie in"):
        rescale_guidance(*pair(), phi)

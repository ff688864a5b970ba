import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import NoiseLevel, classifier_free_guidance, rescale_guidance
from zsnr_diffusers.core.guidance import check_guidance_space, rescale_guidance_in_space


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


def test_a_constant_conditional_leaves_a_wavy_guided_alone_whatever_the_shape():
    wavy, flat = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.full((2, 3, 4), 0.1)
    for shape in [(2, 12), (2, 3, 4), (2, 3, 2, 2), (2, 3, 1, 2, 2)]:
        assert torch.equal(rescale_guidance(wavy.reshape(shape), flat.reshape(shape), 1.0), wavy.reshape(shape))


# In the space of v, of the noise or of x_0


def textbook(kind, x_0, noise, level):
    return {
        "v_prediction": level.alpha * noise - level.sigma * x_0,
        "epsilon": noise,
        "sample": x_0,
    }[kind]


def pair_of_truths(level, seed=0):
    """x_t, and two (x_0, noise) that it could be made of."""
    generator = torch.Generator().manual_seed(seed)
    x_t, first, second = torch.randn(3, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    return x_t, [(x_0, (x_t - level.alpha * x_0) / level.sigma) for x_0 in (first, second + 0.5 * first)]


@pytest.mark.parametrize("space", ["v", "epsilon", "x_0", "v_prediction", "sample"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("alpha", [0.003, 0.4, 0.9])
def test_another_space_is_conversion_algorithm_2_and_conversion_back(space, prediction_type, alpha):
    level = NoiseLevel(alpha, (1 - alpha**2) ** 0.5)
    x_t, truths = pair_of_truths(level)
    target = {"v": "v_prediction", "x_0": "sample"}.get(space, space)
    there = [textbook(target, *truth, level) for truth in truths]
    conditional, guided = there[0], there[0] + 3 * (there[1] - there[0])
    factor = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    rescaled = guided * (0.7 * factor + 0.3)
    x_0 = {
        "v_prediction": level.alpha * x_t - level.sigma * rescaled,
        "epsilon": (x_t - level.sigma * rescaled) / level.alpha,
        "sample": rescaled,
    }[target]
    expected = textbook(prediction_type, x_0, (x_t - level.alpha * x_0) / level.sigma, level)

    outputs = [textbook(prediction_type, *truth, level) for truth in truths]
    result = rescale_guidance_in_space(
        outputs[0] + 3 * (outputs[1] - outputs[0]),
        outputs[0],
        0.7,
        space=space,
        prediction_type=prediction_type,
        x_t=x_t,
        level=level,
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_epsilon_space_at_zero_snr_is_the_limit(prediction_type):
    x_t = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guided, conditional = pair(torch.float64)
    guided, conditional = guided[:2, :, :6, :6], conditional[:2, :, :6, :6]

    def at(alpha):
        level = NoiseLevel(alpha, (1 - alpha**2) ** 0.5)
        return rescale_guidance_in_space(
            guided, conditional, 0.7, space="epsilon", prediction_type=prediction_type, x_t=x_t, level=level
        )

    errors = [(at(alpha) - at(0.0)).abs().max().item() for alpha in (1e-2, 1e-3, 1e-4)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2] > 0  # of first order in alpha
    assert errors[2] < 1e-2
    assert (at(0.0) - guided).abs().max() > 0.1


def test_an_epsilon_output_at_zero_snr_is_refused_in_another_space():
    guided, conditional = pair()
    with pytest.raises(ValueError, match="cannot be used at zero signal-to-noise"):
        rescale_guidance_in_space(
            guided,
            conditional,
            0.7,
            space="v",
            prediction_type="epsilon",
            x_t=guided,
            level=NoiseLevel(0.0, 1.0),
        )


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="space='latent' is unknown; choose one of output, v"):
        check_guidance_space("latent")


def test_half_precision_in_another_space():
    level = NoiseLevel(0.4, 0.84**0.5)
    x_t, truths = pair_of_truths(level)
    outputs = [textbook("v_prediction", *truth, level) for truth in truths]
    kwargs = {"space": "epsilon", "prediction_type": "v_prediction", "level": level}
    exact = rescale_guidance_in_space(outputs[1], outputs[0], 0.7, x_t=x_t, **kwargs)
    half = rescale_guidance_in_space(outputs[1].half(), outputs[0].half(), 0.7, x_t=x_t.half(), **kwargs)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=3e-3, atol=3e-3)  # inputs and result rounded to 11 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_the_result_has_the_dtype_of_the_output(dtype, alpha):
    x_t, truths = pair_of_truths(level := NoiseLevel(alpha, (1 - alpha * alpha) ** 0.5))
    outputs = [textbook("v_prediction", *truth, level).to(dtype) for truth in truths]
    kwargs = {"space": "epsilon", "prediction_type": "v_prediction", "level": level}
    assert rescale_guidance_in_space(*outputs, 0.7, x_t=x_t.to(dtype), **kwargs).dtype == dtype


def test_near_zero_snr_the_noise_space_has_the_digits_of_single_precision():
    """q is a thousand there, and is taken away again."""
    x_t, truths = pair_of_truths(level := NoiseLevel(1e-3, (1 - 1e-6) ** 0.5))
    outputs = [textbook("v_prediction", *truth, level) for truth in truths]
    kwargs = {"space": "epsilon", "prediction_type": "v_prediction", "level": level}
    exact = rescale_guidance_in_space(outputs[1].double(), outputs[0].double(), 0.7, x_t=x_t.double(), **kwargs)
    single = rescale_guidance_in_space(outputs[1].float(), outputs[0].float(), 0.7, x_t=x_t.float(), **kwargs)
    # Inputs and result are rounded to 24 bits: 2e-7. Arithmetic in float32 would be off by 2e-4.
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-6)

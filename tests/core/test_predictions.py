import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import (
    PREDICTION_TYPES,
    NoiseLevel,
    add_noise,
    dynamic_threshold,
    ideal_output,
    training_target,
    x_0_factors,
)
from zsnr_diffusers.core.choices import check_prediction_type
from zsnr_diffusers.core.flow import flow_level
from zsnr_diffusers.core.predictions import converted_prediction

variance_preserving_levels = st.floats(0.0, 1.0).map(lambda a: NoiseLevel(a, (1 - a * a) ** 0.5))
flow_levels = st.floats(0.0, 1.0).map(flow_level)
free_levels = st.builds(NoiseLevel, st.floats(0.0, 3.0), st.floats(0.5, 3.0))
levels = variance_preserving_levels | flow_levels | free_levels


@given(levels, st.sampled_from(PREDICTION_TYPES), st.floats(-9, 9), st.floats(-9, 9))
def test_the_target_leads_back_to_the_sample_that_it_was_made_of(level, kind, x_0, noise):
    if kind == "epsilon" and level.alpha < 1e-3:
        return
    x_0, noise = torch.tensor([x_0], dtype=torch.float64), torch.tensor([noise], dtype=torch.float64)
    target = training_target(kind, x_0, noise, level)
    a, b = x_0_factors(kind, level)
    back = a * add_noise(x_0, noise, level) + b * target
    torch.testing.assert_close(back, x_0, rtol=1e-9, atol=1e-9)  # 1e-3 of signal costs three digits


def test_at_zero_snr_v_is_minus_x_0():
    level = NoiseLevel(0.0, 1.0)
    x_0, noise = torch.randn(2, 5, dtype=torch.float64).unbind()
    assert torch.equal(training_target("v_prediction", x_0, noise, level), -x_0)
    assert x_0_factors("v_prediction", level) == (0.0, -1.0)


@pytest.mark.parametrize("alpha", [0.0, torch.tensor([0.5, 0.0]).reshape(2, 1)])
def test_epsilon_at_zero_snr_is_refused_with_the_remedies(alpha):
    with pytest.raises(ValueError, match=r"zero signal-to-noise.*Retrain.*v_prediction.*rescale_betas_zero_snr=False"):
        x_0_factors("epsilon", NoiseLevel(alpha, 1.0))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.6, 0.999])
def test_the_ideal_output_is_the_mean_of_the_target_over_all_data_that_x_t_may_come_from(kind, alpha):
    """Bayes by summing over a grid: weights p(x_0) p(x_t | x_0), and the target of each x_0."""
    level, mean, spread, x_t = NoiseLevel(alpha, (1 - alpha**2) ** 0.5), -0.4, 2.0, torch.tensor(0.9).double()
    x_0 = torch.linspace(mean - 10 * spread, mean + 10 * spread, 200001, dtype=torch.float64)
    noise = (x_t - level.alpha * x_0) / level.sigma
    weights = (-(((x_0 - mean) / spread) ** 2 + noise**2) / 2).softmax(0)
    wanted = (weights * training_target(kind, x_0, noise, level)).sum()
    torch.testing.assert_close(ideal_output(kind, x_t, level, mean, spread), wanted, rtol=1e-9, atol=1e-9)


@given(levels.filter(lambda level: level.sigma > 1e-3), st.sampled_from(PREDICTION_TYPES), st.floats(-9, 9))
def test_the_ideal_output_for_one_point_leads_to_the_point(level, kind, x):
    if kind == "epsilon" and level.alpha < 1e-3:
        return
    x_t = torch.tensor([x], dtype=torch.float64)
    a, b = x_0_factors(kind, level)
    back = a * x_t + b * ideal_output(kind, x_t, level, 0.7, 0.0)
    torch.testing.assert_close(back, torch.full_like(x_t, 0.7), rtol=1e-9, atol=1e-9)


def test_unknown_prediction_type_is_refused_everywhere():
    level, x = NoiseLevel(0.6, 0.8), torch.ones(1)
    for call in (
        lambda: x_0_factors("flow", level),
        lambda: training_target("flow", x, x, level),
        lambda: ideal_output("flow", x, level, 0.0, 1.0),
        lambda: check_prediction_type("flow", zero_terminal_snr=False),
    ):
        with pytest.raises(ValueError, match="'flow' is unknown; choose one of epsilon, sample, v_prediction"):
            call()


def test_flow_matching_is_no_prediction_of_a_schedule_with_betas():
    with pytest.raises(ValueError, match=r"flow_prediction' means flow matching.*FlowMatchMultistepScheduler"):
        check_prediction_type("flow_prediction", zero_terminal_snr=True)


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 1), (3, 5, 7, 2)])
@pytest.mark.parametrize(("ratio", "max_value"), [(0.995, 1.0), (0.9, 2.5), (1.0, 9.0), (0.0, 3.0)])
def test_dynamic_threshold_equals_stock(size, ratio, max_value):
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    x = 2 * torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    expected = stock._threshold_sample(x.reshape(4, *size, *[1] * (3 - len(size)))).reshape(x.shape)
    torch.testing.assert_close(dynamic_threshold(x, ratio, max_value), expected)


@given(levels, st.floats(0.2, 5.0), st.sampled_from(PREDICTION_TYPES), st.sampled_from(PREDICTION_TYPES))
def test_an_output_is_converted_to_that_of_the_same_data_and_noise_at_a_level_of_another_length(
    level, length, kind, wanted
):
    if level.sigma < 1e-3 or (level.alpha < 1e-3 and "epsilon" in (kind, wanted)):
        return
    x_0, noise = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = NoiseLevel(length * level.alpha, length * level.sigma)
    output = training_target(kind, x_0, noise, level)
    converted = converted_prediction(output, add_noise(x_0, noise, level), level, kind, wanted, other)
    torch.testing.assert_close(converted, training_target(wanted, x_0, noise, other), rtol=1e-6, atol=1e-6)

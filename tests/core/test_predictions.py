import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr_diffusers.core import PREDICTION_TYPES, NoiseLevel, add_noise, split_prediction, training_target
from zsnr_diffusers.core.predictions import check_prediction_type

levels = st.floats(0.0, 1.0).map(lambda a: NoiseLevel(a, (1 - a * a) ** 0.5))


@given(levels, st.sampled_from(PREDICTION_TYPES), st.floats(-9, 9), st.floats(-9, 9))
def test_the_target_splits_into_the_pair_that_made_it(level, kind, x_0, noise):
    if (kind == "epsilon" and level.alpha < 1e-3) or (kind == "sample" and level.sigma < 1e-3):
        return
    x_0, noise = torch.tensor([x_0], dtype=torch.float64), torch.tensor([noise], dtype=torch.float64)
    target = training_target(kind, x_0, noise, level)
    back = split_prediction(kind, target, add_noise(x_0, noise, level), level)
    for a, b in zip(back, (x_0, noise), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # 1e-3 of signal costs three digits


def test_at_zero_snr_v_is_minus_x_0_and_splits_exactly():
    level = NoiseLevel(0.0, 1.0)
    x_0, noise = torch.randn(2, 5, dtype=torch.float64).unbind()
    v = training_target("v_prediction", x_0, noise, level)
    assert torch.equal(v, -x_0)
    back = split_prediction("v_prediction", v, noise, level)
    assert torch.equal(back[0], x_0)
    assert torch.equal(back[1], noise)


@pytest.mark.parametrize("alpha", [0.0, torch.tensor([0.5, 0.0]).reshape(2, 1)])
def test_epsilon_at_zero_snr_is_refused_with_the_remedies(alpha):
    with pytest.raises(ValueError, match=r"zero signal-to-noise.*Retrain.*v_prediction.*rescale_betas_zero_snr=False"):
        split_prediction("epsilon", torch.ones(2, 3), torch.ones(2, 3), NoiseLevel(alpha, 1.0))


def test_unknown_prediction_type_is_refused_everywhere():
    level, x = NoiseLevel(0.6, 0.8), torch.ones(1)
    for call in (
        lambda: split_prediction("flow", x, x, level),
        lambda: training_target("flow", x, x, level),
        lambda: check_prediction_type("flow", zero_terminal_snr=False),
    ):
        with pytest.raises(ValueError, match="'flow' is not known; choose one of epsilon, sample, v_prediction"):
            call()

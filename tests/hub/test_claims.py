"""What the config of a scheduler says of a model."""

import pytest
from diffusers import (
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiny_checkpoints import V, sd_scheduler

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRMultistepScheduler
from zsnr_diffusers.hub.claims import SCHEDULER, Claim, scheduler_claim


def test_what_a_scheduler_s_config_leaves_out_is_its_class_s_default():
    assert scheduler_claim({"_class_name": "PNDMScheduler"}) == scheduler_claim(PNDMScheduler().config)
    ours = scheduler_claim({"_class_name": "ZeroSNRMultistepScheduler", "prediction_type": V})
    assert ours == scheduler_claim(ZeroSNRMultistepScheduler(prediction_type=V).config)
    assert (ours.prediction_type, ours.rescale_betas_zero_snr) == (V, True)


def test_a_flag_that_the_class_ignores_still_says_it_of_the_model():
    config = HeunDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config).config
    assert scheduler_claim(config).rescale_betas_zero_snr is True


@pytest.mark.parametrize(
    "config",
    [
        FlowMatchEulerDiscreteScheduler().config,
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config,
        FlowMatchMultistepScheduler(shift=3.0).config,
    ],
)
def test_flow_matching_is_known_by_its_scheduler(config):
    assert scheduler_claim(config) == Claim(SCHEDULER, "flow_prediction")


def test_other_models_say_nothing():
    assert scheduler_claim(EDMEulerScheduler().config) == Claim(SCHEDULER)
    assert scheduler_claim({}) == Claim(SCHEDULER)
    assert scheduler_claim({"_class_name": "NoSuchScheduler", "prediction_type": V}) == Claim(SCHEDULER)

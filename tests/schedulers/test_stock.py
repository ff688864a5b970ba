"""Stock schedulers that stand in for those of this package; what they sample is tested with what is saved."""

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from oracles import make

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler
from zsnr_diffusers.schedulers.stock import is_flow_stand_in, stock_flow_scheduler, stock_scheduler


def test_one_of_stock_stays_and_takes_changes():
    scheduler = DDIMScheduler(beta_schedule="linear")
    assert stock_scheduler(scheduler) is scheduler
    changed = stock_scheduler(scheduler, prediction_type="v_prediction")
    assert type(changed) is DDIMScheduler
    assert (changed.config.prediction_type, changed.config.beta_schedule) == ("v_prediction", "linear")
    assert scheduler.config.prediction_type == "epsilon"


def test_zero_snr_has_euler_and_its_absence_ddim():
    assert type(stock_scheduler(make("ddim"))) is EulerDiscreteScheduler
    assert type(stock_scheduler(make("ddim", rescale_betas_zero_snr=False))) is DDIMScheduler


def test_an_snr_shift_has_none():
    scheduler = ZeroSNRDDIMScheduler(snr_shift_scale=2.0)
    message = (
        "has no equivalent diffusers scheduler here; replace the pipeline's scheduler with a diffusers scheduler first"
    )
    with pytest.raises(ValueError, match=f"snr_shift_scale=2.0 of ZeroSNRDDIMScheduler {message}"):
        stock_scheduler(scheduler)


@pytest.mark.parametrize("change", [{"invert_sigmas": True}, {"prediction_type": "sample"}])
def test_flows_of_other_kinds_have_none(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* no diffusers scheduler samples such a flow model"):
        stock_flow_scheduler(FlowMatchMultistepScheduler(**change))


def test_a_stand_in_is_known_again_after_saving_and_one_that_was_chosen_is_not(tmp_path):
    stand_in = stock_flow_scheduler(FlowMatchMultistepScheduler(shift=2.0))
    stand_in.save_pretrained(tmp_path)
    assert is_flow_stand_in(UniPCMultistepScheduler.from_pretrained(tmp_path))
    assert not is_flow_stand_in(UniPCMultistepScheduler.from_config(stand_in.config, solver_order=3))
    assert not is_flow_stand_in(UniPCMultistepScheduler())
    assert not is_flow_stand_in(EulerDiscreteScheduler())

"""A scheduler with the timesteps and weights of a calibration in its config."""

import copy
import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from calibrations import calibration, default_weights, explicit_run
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from oracles import SD, levels, make, nonlinear, run, sample, start

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler
from zsnr_diffusers.hub.custom_pipeline import custom_pipeline_source


def calibrated(n=5, **config):
    return make("multistep", calibration=calibration(n), **config)


# -- what it does


def test_its_number_of_steps_takes_its_timesteps_and_weights():
    x, entry = start(4, 3, dtype=torch.float64), calibration()["5"]
    scheduler = calibrated()
    found = sample(scheduler, x, nonlinear, 5)
    assert scheduler.timesteps.tolist() == entry["timesteps"]
    torch.testing.assert_close(found, explicit_run(entry, *levels(), x, nonlinear), rtol=0, atol=1e-12)


def test_other_numbers_of_steps_are_the_default():
    scheduler, default = calibrated(), make("multistep")
    for n in (5, 4, 6, 5, 12):
        results = [sample(one, start(), nonlinear, n) for one in (scheduler, default)]
        assert torch.equal(*results) == (n != 5)
        assert torch.equal(scheduler.timesteps, default.timesteps) == (n != 5)


def test_other_timesteps_and_sigmas_of_the_caller_have_the_weights_of_the_default():
    scheduler, default = calibrated(), make("multistep")
    for given in ({"timesteps": [999, 800, 600, 300, 21]}, {"sigmas": [100.0, 5.0, 1.0, 0.3, 0.1]}):
        scheduler.set_timesteps(5)
        for one in (scheduler, default):
            one.set_timesteps(**given)
        assert torch.equal(*(run(one, start(), nonlinear) for one in (scheduler, default)))


def test_its_timesteps_given_by_the_caller_are_its_steps():
    """As pipelines do that choose timesteps themselves."""
    scheduler, other = calibrated(), calibrated()
    scheduler.set_timesteps(5)
    other.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert torch.equal(*(run(one, start(), nonlinear) for one in (scheduler, other)))


@pytest.mark.parametrize("begin", [1, 3])
def test_a_run_that_begins_later_has_its_timesteps_and_the_weights_of_the_default(begin):
    scheduler, default = calibrated(), make("multistep")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(begin)
    default.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert torch.equal(*(run(one, start(), nonlinear, begin) for one in (scheduler, default)))


def test_it_has_no_safeguard():
    """Weights that are the default's lead where the default leads without it."""
    swinging = lambda x, t: 3 * torch.cos(0.05 * t + x)  # noqa: E731
    default = make("multistep")
    scheduler = make("multistep", calibration={"5": default_weights(default, 5)})
    guarded = sample(default, start(), swinging, 5)
    default._make_safeguards = lambda *args: []
    wanted = sample(default, start(), swinging, 5)
    found = sample(scheduler, start(), swinging, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, guarded, rtol=1e-2)


def test_a_constant_output_is_exact():
    alphas, sigmas = levels()
    point = lambda x, t: (alphas[t] * (x - alphas[t] * 0.7) / sigmas[t]) - sigmas[t] * 0.7  # noqa: E731
    found = sample(calibrated(), start(dtype=torch.float64), point, 5)
    torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=0, atol=1e-6)


def with_kappas(scale=1.0, **changes):
    """A calibration with a sum of the last row and factors of its own, as fitted ones, and its kappas."""
    alphas, sigmas = levels()
    entry = calibration()["5"]
    kappas = [scale * float(alphas[t] / sigmas[t]) for t in entry["timesteps"]]
    rows = [*entry["weights"][:4], [0.95 * weight for weight in entry["weights"][4]]]
    return {"5": {**entry, "weights": rows, "keeps": [1.0, 1.1, 0.9, 1.0, -0.02], "kappas": kappas, **changes}}


def test_rows_of_another_sum_are_taken_with_the_kappas_they_were_made_for():
    scheduler, entry = make("multistep", calibration=with_kappas()), with_kappas()["5"]
    x = start(4, 3, dtype=torch.float64)
    wanted = explicit_run(entry, *levels(), x, nonlinear)
    torch.testing.assert_close(sample(scheduler, x, nonlinear, 5), wanted, rtol=0, atol=1e-12)


def test_factors_that_are_not_given_are_those_of_the_equation():
    x, keeps = start(4, 3, dtype=torch.float64), [1.0, 1.0, 1.0, 1.0, 0.0]
    given = make("multistep", calibration=with_kappas(keeps=keeps))
    entry = with_kappas()["5"]
    del entry["keeps"]
    assert torch.equal(*(sample(s, x, nonlinear, 5) for s in (given, make("multistep", calibration={"5": entry}))))


# -- where it is kept


def test_every_way_to_keep_a_config_keeps_it(tmp_path):
    scheduler = calibrated(7)
    scheduler.save_pretrained(tmp_path)
    wanted = sample(copy.deepcopy(scheduler), start(), nonlinear, 7)
    cls = ZeroSNRMultistepScheduler
    for other in (
        cls.from_pretrained(tmp_path),
        cls.from_config(scheduler.config),
        cls.from_config(json.loads(scheduler.to_json_string())),
        cls.from_config(ZeroSNRDDIMScheduler.from_config(scheduler.config).config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        assert other.config["calibration"] == calibration(7)
        assert torch.equal(sample(other, start(), nonlinear, 7), wanted)


def test_numbers_may_be_numbers_and_are_kept_as_texts():
    entry = calibration()["5"]
    scheduler = make("multistep", calibration={5: entry})
    assert scheduler.config["calibration"] == {"5": entry}
    assert sample(scheduler, start(), nonlinear, 5).isfinite().all()


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_schedulers_of_diffusers_take_its_config(cls):
    back = cls.from_config(calibrated().config)
    back.set_timesteps(5)
    again = ZeroSNRMultistepScheduler.from_config(back.config)
    assert again.config["calibration"] is None  # as other settings of a sampler


def test_the_file_for_people_without_this_package_has_it(monkeypatch):
    source = custom_pipeline_source(StableDiffusionPipeline, 0.7, sampler=calibrated())
    module = types.ModuleType("alone")
    monkeypatch.setitem(sys.modules, "alone", module)
    exec(source, vars(module))
    assert f"calibration={calibration()!r}" in source
    there = module.ZeroSNRMultistepScheduler.from_config(DDIMScheduler(**SD).config, calibration=calibration())
    assert torch.equal(sample(there, start(), nonlinear, 5), sample(calibrated(), start(), nonlinear, 5))


# -- what it does not fit


@pytest.mark.parametrize(
    "override",
    [
        {"beta_start": 0.001},
        {"rescale_betas_zero_snr": False},
        {"num_train_timesteps": 500},
        {"trained_betas": np.linspace(0.001, 0.02, 1000)},
        {"prediction_type": "sample"},
        {"timestep_spacing": "trailing"},
        {"solver_order": 2},
        {"corrector": False},
        {"eta": 1.0},
    ],
    ids=lambda override: next(iter(override)),
)
def test_an_override_that_it_was_not_made_for_leaves_it_out_and_says_so(override, log):
    scheduler = ZeroSNRMultistepScheduler.from_config(calibrated().config, **override)
    assert scheduler.config["calibration"] is None
    assert "calibration of 5 steps is dropped: it was fitted for" in log.text
    assert "Fit it again with zsnr calibrate" in log.text


@pytest.mark.parametrize(
    "override",
    [
        {},
        {"timestep_spacing": "kappa"},
        {"eta": 0},
        {"solver_order": 3, "clip_sample": False},
        {"beta_start": 0.00085},
    ],
)
def test_an_override_that_changes_nothing_of_it_leaves_it(override, log):
    scheduler = ZeroSNRMultistepScheduler.from_config(calibrated().config, **override)
    assert scheduler.config["calibration"] == calibration()
    assert "is dropped" not in log.text


def changed(**changes):
    entry = calibration()["5"]
    return {"5": {**entry, **changes}}


WEIGHTS = calibration()["5"]["weights"]
BAD = [
    ([1, 2], "must map step counts"),
    ({"five": {}}, "has the key 'five', which is not a step count"),
    ({"5": {}}, "of 5 steps lacks 'timesteps'"),
    ({"5": 3}, "of 5 steps cannot be read"),
    ({"6": calibration()["5"]}, "of 6 steps has 5 timesteps, 5 rows of weights and 5 factors"),
    (changed(timesteps=[999, 800, 600, 300]), "of 5 steps has 4 timesteps, 5 rows of weights and 4 factors"),
    (changed(timesteps=[999, 800, 600, 300, -1]), r"timesteps \[-1\] lie outside \[0, 999\]"),
    (changed(timesteps=[999, 800, 900, 300, 20]), "must decrease strictly; 900 follows 800"),
    (changed(timesteps=[990, 885, 656, 255, 23]), "begins at timestep 990, but the schedule at 999"),
    (changed(weights=[*WEIGHTS[:4], [*WEIGHTS[4], 0.0, 0.0]]), "uses 5 outputs in a step, but this solver_order"),
    (changed(weights=[*WEIGHTS[:4], [*WEIGHTS[4], 0.0]]), "has 3 weights in step 4, where 4 outputs are combined"),
    (changed(weights=[*WEIGHTS[:4], WEIGHTS[4][:2]]), "has 2 weights in step 5, where 3 outputs are combined"),
    (changed(weights=[*WEIGHTS[:4], [0.5, 0.2, 0.1]]), "the weights of step 5 have the sum 0.8, .* needs 1;"),
    (changed(weights=[*WEIGHTS[:4], [float("nan"), 0.2, 0.1]]), "the sum nan"),
    (changed(weights=[*WEIGHTS[:4], ["x", 0.2, 0.1]]), "of 5 steps cannot be read: could not convert"),
    (with_kappas(1.001), "another noise schedule: alpha / sigma at timestep .* was .*, and this schedule has"),
    (with_kappas(kappas=[0.0, 1.0]), "of 5 steps has 2 kappas"),
    (with_kappas(keeps=[1.0, 1.0]), r"5 rows of weights and 2 factors \(keeps\)"),
    (with_kappas(keeps=[1.0, 1.0, 1.0, float("nan"), 0.0]), "which are not finite"),
    (
        with_kappas(weights=[*WEIGHTS[:4], [float("inf"), 0.2, 0.1]]),
        r"has the weights \[inf, 0.2, 0.1\], which are not finite",
    ),
]


def test_a_calibration_may_combine_as_many_outputs_as_order_three():
    """Those that were fitted when few steps could be of order 3."""
    four = changed(weights=[*WEIGHTS[:3], *([*row, 0.0] for row in WEIGHTS[3:])])
    three, padded = (make("multistep", calibration=entry) for entry in (calibration(), four))
    for scheduler in (three, padded):
        scheduler.set_timesteps(5)
    for update, other in zip(three._updates_from(0, 0.0), padded._updates_from(0, 0.0), strict=True):
        assert other.gains == (*update.gains, *[0.0] * (len(other.gains) - len(update.gains)))


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_what_does_not_fit_is_refused_with_the_remedy(bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        make("multistep", calibration=bad)
    assert "pass calibration=None to sample without it" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_start": 0.001}, "fitted for another noise schedule: the weights of step 1 have the sum"),
        ({"num_train_timesteps": 1500}, "begins at timestep 999, but the schedule at 1499"),
        ({"rescale_betas_zero_snr": False}, "fitted for another noise schedule"),
        ({"solver_order": 1}, "uses 3 outputs in a step, but this solver_order and corrector use at most 2"),
        (
            {"solver_order": 2, "corrector": False},
            "3 outputs in a step, but this solver_order and corrector use at most 2",
        ),
        ({"eta": 1.0}, "requires eta=0, but eta=1.0 adds noise"),
    ],
)
def test_another_schedule_or_sampler_is_refused_where_it_is_made_directly(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrated(**config)

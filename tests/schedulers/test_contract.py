"""What diffusers asks of each of its own schedulers: a config that survives, an interface, steps that repeat."""

import copy
import inspect
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
from cases import thirds
from diffusers import DDIMScheduler, EulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from oracles import BETAS, CLASSES, SD, levels, seeded, start

from zsnr_diffusers import ZeroSNRDDIMInverseScheduler, ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler

every_class = pytest.mark.parametrize("ours", CLASSES, ids=lambda c: c.__name__)
MARK = "_use_default_values"
CONFIGS = {
    "none": {},
    "some": SD,
    "pixels": {"prediction_type": "sample", "clip_sample": True, "num_train_timesteps": 100},
    "kappa": {**SD, "timestep_spacing": "kappa"},
    "not zero": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "timestep_spacing": "leading"},
    "betas": {"trained_betas": np.linspace(1e-3, 0.1, 60)},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def unmarked(scheduler):
    return {key: value for key, value in scheduler.config.items() if key != MARK}


def first_steps(scheduler, n=10):
    """Results of the first two of n steps on outputs that change with the timestep."""
    scheduler.set_timesteps(n)
    x, results = start(4, 3, 8, 8), []
    for t in scheduler.timesteps[:2]:
        output = torch.sin(x + 0.01 * t)
        result = scheduler.step(output, t, x, generator=seeded(3))
        results += [result.prev_sample, result.pred_original_sample]
        x = result.prev_sample
    return results


# -- the config


@every_class
@every_config
def test_a_scheduler_read_back_has_its_config_and_its_steps(ours, config, tmp_path):
    scheduler = ours(**config)
    made = ours.from_config(scheduler.config)
    assert dict(made.config) == dict(scheduler.config)
    scheduler.save_pretrained(tmp_path)
    read = ours.from_pretrained(tmp_path)
    assert MARK in scheduler.config  # as with diffusers' own: something was left at its default,
    assert MARK not in read.config  # and a file states everything
    assert MARK not in json.loads((tmp_path / "scheduler_config.json").read_text())
    assert dict(read.config) == unmarked(scheduler)
    read.save_pretrained(tmp_path)
    assert dict(ours.from_pretrained(tmp_path).config) == dict(read.config)
    for other in (read, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config
        assert (other.config != scheduler.config) is False
        assert all(map(torch.equal, first_steps(other), first_steps(scheduler)))
    assert made.config != ours.from_config(scheduler.config, clip_sample_range=7.0).config
    assert made.config != 5


@pytest.mark.full
@thirds(("ours", "spacing"), CLASSES, ["trailing", "kappa", None])
def test_every_compatible_class_of_diffusers_takes_our_config_and_gives_it_back(ours, spacing):
    """Several of them set their timesteps when they are made, so a spacing that they do not know would raise."""
    scheduler = ours(**SD, **({"timestep_spacing": spacing} if spacing else {}))
    assert len(scheduler.compatibles) >= 12
    for theirs in scheduler.compatibles:
        stock = theirs.from_config(scheduler.config)
        facts = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        accepted = inspect.signature(theirs).parameters
        assert {key: stock.config[key] for key in facts if key in accepted} == {
            key: value for key, value in facts.items() if key in accepted
        }
        back = ours.from_config(stock.config)
        assert {key: back.config[key] for key in scheduler.config} == dict(scheduler.config)
        added = {key for key in back.config if key not in scheduler.config}
        assert not added & set(inspect.signature(ours.__init__).parameters)


@pytest.mark.parametrize("ours", [ZeroSNRDDIMScheduler, ZeroSNRMultistepScheduler])
def test_kappa_survives_and_can_be_replaced(ours, tmp_path):
    """In the config `trailing` is for diffusers' classes, beside what ours take."""
    scheduler, even = ours(timestep_spacing="kappa", **SD), ours(timestep_spacing="trailing", **SD)
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({**SD, "_class_name": ours.__name__, "timestep_spacing": "kappa"})  # as older files have it
    )
    wanted = visited(scheduler)
    assert wanted != visited(even)
    for other in (ours.from_config(scheduler.config), ours.from_pretrained(tmp_path), ours(**scheduler.config)):
        assert visited(other) == wanted
    assert visited(ours.from_config(scheduler.config, timestep_spacing="trailing")) == visited(even)
    assert visited(ours.from_config(even.config, timestep_spacing="kappa")) == wanted
    stock = DDIMScheduler.from_config(scheduler.config)
    assert visited(stock) == visited(even)


def visited(scheduler, n=10):
    scheduler.set_timesteps(n)
    return scheduler.timesteps.tolist()


@every_class
def test_the_hub_s_files_are_read_quietly(ours, tmp_path, caplog):
    ours(**SD).save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    try:
        ours.from_pretrained(tmp_path)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


# -- the interface


@every_class
def test_interface(ours):
    scheduler = ours()
    assert isinstance(scheduler, SchedulerMixin)
    assert isinstance(scheduler, ConfigMixin)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0
    assert "kwargs" not in inspect.signature(ours.__init__).parameters
    assert ours._deprecated_kwargs == []
    scheduler.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert scheduler.test_attribute == 5
    with pytest.warns(FutureWarning, match="num_train_timesteps"):
        assert scheduler.num_train_timesteps == 1000


@every_class
def test_betas_are_those_of_the_rescaled_schedule(ours):
    """Against diffusers' own, float32; it differs by its rounding, which the ratio of two alphas near 0 multiplies."""
    stock = DDIMScheduler(rescale_betas_zero_snr=True, **SD)
    betas = ours(**SD).betas
    assert betas[-1] == 1
    torch.testing.assert_close(betas[:-10], stock.betas[:-10], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close((1 - betas.double()).cumprod(0), ours(**SD)._table, rtol=1e-3, atol=1e-9)


# -- defaults and what is left out


@pytest.mark.parametrize(
    "config",
    [{}, BETAS, {"_class_name": "DDIMScheduler"}, {"_class_name": "RePaintScheduler"}, {"_class_name": "Unknown"}],
    ids=str,
)
@every_class
def test_what_a_config_of_diffusers_leaves_out_is_epsilon(ours, config):
    """Also where nothing says whose config it is: all but ours mean that."""
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot be used"):
        ours.from_config(config)
    assert ours.from_config(config, rescale_betas_zero_snr=False).config.prediction_type == "epsilon"
    assert ours.from_config(config, prediction_type="sample").config.prediction_type == "sample"


@every_class
def test_what_a_config_of_ours_leaves_out_is_our_default(ours):
    for source in CLASSES:
        assert ours.from_config({"_class_name": source.__name__}).config.prediction_type == "v_prediction"


@every_class
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_goes_through_a_class_of_diffusers_and_back(ours, prediction_type):
    zero = prediction_type != "epsilon"
    scheduler = ours(prediction_type=prediction_type, rescale_betas_zero_snr=zero)
    stock = EulerDiscreteScheduler.from_config(scheduler.config)
    assert stock.config.prediction_type == prediction_type
    back = ours.from_config(stock.config, rescale_betas_zero_snr=zero)
    assert back.config.prediction_type == prediction_type


# -- betas of any number


@every_class
@pytest.mark.parametrize("count", [2, 50, 500, 1500])
def test_trained_betas_set_the_number_of_timesteps(ours, count, tmp_path):
    betas = np.linspace(1e-4, 0.02, count)
    stock = DDIMScheduler(trained_betas=betas, prediction_type="sample")  # which says 1000 whatever the betas
    made = [
        ours(trained_betas=betas, prediction_type="sample"),
        ours(trained_betas=torch.tensor(betas), num_train_timesteps=count, prediction_type="sample"),
        ours(trained_betas=tuple(betas), num_train_timesteps=1000, prediction_type="sample"),
        ours.from_config(stock.config),
    ]
    made[0].save_pretrained(tmp_path)
    for scheduler in [*made, ours.from_pretrained(tmp_path)]:
        assert scheduler.config.num_train_timesteps == len(scheduler) == count
        assert scheduler.config.trained_betas == betas.tolist()
        scheduler.set_timesteps(count)
        steps = scheduler.timesteps.tolist()
        assert sorted(steps) == list(range(count))
    kept = ours(trained_betas=betas, prediction_type="sample", rescale_betas_zero_snr=False)
    torch.testing.assert_close(kept.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=0)  # its float32 product
    for wrong in (count + 1, 999):
        with pytest.raises(ValueError, match=f"{count} values for num_train_timesteps={wrong}"):
            ours(trained_betas=betas, num_train_timesteps=wrong)


@every_class
@pytest.mark.parametrize("T", [2, 50, 100])
def test_models_of_few_timesteps(ours, T):
    scheduler = ours.from_config(DDIMScheduler(num_train_timesteps=T, prediction_type="v_prediction").config)
    for n in (1, 2, T):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert scheduler.timesteps.max() == T - 1
    with pytest.raises(ValueError, match=f"num_inference_steps={T + 1} is not possible: the model has {T} "):
        scheduler.set_timesteps(T + 1)


# -- sigmas


def spoken(cls, values):
    """In the direction that a class steps in."""
    return list(values)[::-1] if cls is ZeroSNRDDIMInverseScheduler else list(values)


@every_class
@pytest.mark.parametrize("schedule", [BETAS, {}, {"num_train_timesteps": 7}], ids=["scaled", "linear", "seven"])
def test_sigmas_of_euler_lead_to_its_timesteps(ours, schedule):
    """It writes the infinite sigma of pure noise as 4096, which the linear schedule has a larger one beside."""
    stock = EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", **schedule)
    scheduler = ours(**schedule)
    for n in (n for n in (1, 2, 3, 7, 50, 333, 1000) if n <= len(scheduler)):
        stock.set_timesteps(n)
        for sigmas in (stock.sigmas.tolist(), stock.sigmas[:-1].tolist()):
            scheduler.set_timesteps(sigmas=spoken(ours, sigmas), device="cpu")
            assert scheduler.timesteps.tolist() == spoken(ours, stock.timesteps.long().tolist())
            assert scheduler.num_inference_steps == n


@every_class
def test_the_sigma_of_each_timestep_leads_to_it_and_so_does_what_is_near(ours):
    alphas, sigmas = map(torch.tensor, levels())
    own, scheduler = (sigmas / alphas).flip(0), ours(**SD)
    assert own[0] == torch.inf
    for kind in (list, tuple, np.array, torch.tensor):
        scheduler.set_timesteps(sigmas=kind(spoken(ours, own.tolist())))
        assert scheduler.timesteps.tolist() == spoken(ours, range(999, -1, -1))
    for factor in (0.9999, 1.0001):
        scheduler.set_timesteps(sigmas=spoken(ours, [1e6, *(own[1::10] * factor).tolist()]))
        assert scheduler.timesteps.tolist() == spoken(ours, [999, *range(998, -1, -10)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sigmas": []}, r"sigmas=\[\] must be numbers of at least 0, one of them above 0"),
        ({"sigmas": [0.0]}, r"sigmas=\[0.0\] must be numbers of at least 0"),
        ({"sigmas": [float("nan")]}, r"sigmas=\[nan\] must be numbers"),
        ({"sigmas": [3.0, -1.0]}, r"sigmas=\[3.0, -1.0\] must be numbers"),
        ({"sigmas": [3.0, 3.0]}, "sigmas must (de|in)crease strictly; 3 follows 3"),
        ({"sigmas": [3.0, 9.0, 5.0]}, "sigmas must (decrease strictly; 9|increase strictly; 5) follows"),
        ({"sigmas": [3.0], "num_inference_steps": 1}, "either num_inference_steps or timesteps or sigmas"),
        ({"sigmas": [3.0], "timesteps": [5]}, "either num_inference_steps or timesteps or sigmas"),
    ],
)
@every_class
def test_sigmas_that_cannot_be_visited_are_named(ours, call, message):
    with pytest.raises(ValueError, match=message):
        ours(**SD).set_timesteps(**call)


@every_class
def test_sigmas_too_near_to_each_other_are_named(ours):
    with pytest.raises(ValueError, match=r"sigmas 5.* and (4.999|5) both map to timestep \d+|sigmas 4.999 and 5 both"):
        ours(**SD).set_timesteps(sigmas=spoken(ours, [5.0, 4.999, 1.0]))

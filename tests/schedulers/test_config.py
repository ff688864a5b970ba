import copy
import functools
import inspect
import json
import pickle
import re
import warnings

import diffusers
import numpy as np
import pytest
import torch
from cases import thirds
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from oracles import BETAS, CLASSES, SAMPLERS, SD, make, nonlinear, sample, seeded, start

from zsnr_diffusers import (
    ZeroSNRDDIMInverseScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
)

every_class = pytest.mark.parametrize("ours", CLASSES, ids=lambda c: c.__name__)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def public(scheduler):
    return {k: v for k, v in scheduler.config.items() if k[0] != "_"}


# -- configs of stock schedulers


def stock_schedulers():
    """Every scheduler of the installed diffusers that takes betas."""
    for name in dir(diffusers):
        if not name.endswith("Scheduler"):
            continue
        member = getattr(diffusers, name)
        module = getattr(member, "__module__", "")
        if "dummy" in module or "flax" in name.lower():
            continue
        if "beta_schedule" in inspect.signature(member.__init__).parameters:
            yield member


@thirds(("ours", "stock_cls", "explicit"), CLASSES, list(stock_schedulers()), [True, False])
def test_from_any_stock_config_ends_at_zero_snr_and_visits_the_last_timestep(ours, stock_cls, explicit, log):
    accepted = inspect.signature(stock_cls.__init__).parameters
    stock = stock_cls(
        **({k: v for k, v in BETAS.items() if k in accepted and "beta_start" in accepted} if explicit else {})
    )
    scheduler = ours.from_config(stock.config, prediction_type="v_prediction", clip_sample=False)
    assert "not carried over" not in log.text  # stock's defaults need no warning
    assert scheduler.alphas_cumprod[-1] == 0
    for fact in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert scheduler.config[fact] == stock.config.get(fact, scheduler.config[fact])
    for n in (1, 5, 61, 1000):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert scheduler.timesteps[-1 if ours is ZeroSNRDDIMInverseScheduler else 0] == 999


def test_there_are_many_stock_schedulers():
    assert len(list(stock_schedulers())) >= 15


CARRIED, NAMED, REFUSED = "carried", "named in a warning", "refused"
FLAGS = [
    ("thresholding", True, CARRIED),
    ("clip_sample", True, CARRIED),
    ("clip_sample_range", 2.0, CARRIED),
    ("dynamic_thresholding_ratio", 0.9, CARRIED),
    ("sample_max_value", 3.0, CARRIED),
    ("snr_shift_scale", 2.0, CARRIED),
    ("num_train_timesteps", 200, CARRIED),
    ("use_karras_sigmas", True, NAMED),
    ("use_exponential_sigmas", True, NAMED),
    ("use_beta_sigmas", True, NAMED),
    ("use_lu_lambdas", True, NAMED),
    ("interpolation_type", "log_linear", NAMED),
    ("algorithm_type", "sde-dpmsolver", NAMED),
    ("algorithm_type", "sde-dpmsolver++", NAMED),
    ("variance_type", "fixed_large", NAMED),
    ("variance_type", "fixed_large_log", NAMED),
    ("variance_type", "learned", REFUSED),
    ("variance_type", "learned_range", REFUSED),
    ("timestep_type", "continuous", REFUSED),
    ("use_flow_sigmas", True, REFUSED),
]


@functools.cache
def with_flag(flag, value):
    """Configs, in memory and from their files, of every stock scheduler that this flag can be given to."""
    found = []
    for stock_cls in stock_schedulers():
        if flag in inspect.signature(stock_cls.__init__).parameters:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # sde-dpmsolver is to go
                    stock = stock_cls(**{flag: value})
            except (ImportError, NotImplementedError, ValueError):
                continue
            if stock.config[flag] == value:  # DEIS takes the names of other algorithms for its own
                found += [stock.config, json.loads(stock.to_json_string())]
    return found


@every_class
@pytest.mark.parametrize(("flag", "value", "fate"), FLAGS)
def test_flags_of_stock_configs_are_carried_named_or_refused(ours, flag, value, fate, log):
    if ours is ZeroSNRDDPMScheduler and value == "fixed_large":
        fate = CARRIED
    overrides = {"prediction_type": "v_prediction"}
    if flag != "num_train_timesteps":
        overrides["num_train_timesteps"] = 60  # made sooner
    assert with_flag(flag, value)
    for config in with_flag(flag, value):
        log.clear()
        if fate == REFUSED:
            with pytest.raises(ValueError, match=re.escape(f"{flag}={value!r}: ")):  # a reason follows
                ours.from_config(config, **overrides)
            continue
        scheduler = ours.from_config(config, **overrides)
        assert (scheduler.config.get(flag) == value) == (fate == CARRIED)
        assert (f"{flag}={value!r} is not carried over: " in log.text) == (fate == NAMED)
        assert scheduler.alphas_cumprod[-1] == 0


@every_class
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_snr_shift_is_applied_before_the_rescale(ours, scale, zero_snr):
    stock = CogVideoXDDIMScheduler(snr_shift_scale=scale, rescale_betas_zero_snr=zero_snr, **SD)
    scheduler = ours.from_config(stock.config, rescale_betas_zero_snr=zero_snr)
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod.float(), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_config_of_another_kind_of_model_is_refused(name):
    stock = getattr(diffusers, name)()
    for config in (stock.config, json.loads(stock.to_json_string())):
        with pytest.raises(ValueError, match=r"(has|have) no betas"):
            ZeroSNRDDIMScheduler.from_config(config)


def test_gaps_in_a_file_are_filled_with_the_defaults_of_the_class_that_wrote_it():
    scheduler = ZeroSNRDDIMScheduler.from_config({"_class_name": "LCMScheduler", "prediction_type": "v_prediction"})
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.beta_end == 0.012


def test_schedule_is_kept_on_request():
    stock = DDIMScheduler(**BETAS)
    scheduler = ZeroSNRDDIMScheduler.from_config(stock.config, rescale_betas_zero_snr=False)
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=0)
    assert scheduler.config.prediction_type == "epsilon"


def test_config_without_prediction_type_is_an_epsilon_model_and_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot be used"):
        ZeroSNRDDIMScheduler.from_config(BETAS)


@pytest.mark.parametrize("stock_cls", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_back_to_stock_in_memory_keeps_zero_snr_and_spacing(stock_cls):
    """Stock drops what an in-memory config marks as default; ours marks nothing."""
    back = stock_cls.from_config(ZeroSNRDDIMScheduler(**SD).config)
    assert back.config.rescale_betas_zero_snr is True
    assert back.config.timestep_spacing == "trailing"
    assert back.config.prediction_type == "v_prediction"
    assert back.config.get("clip_sample", False) is False
    assert back.alphas_cumprod[-1] <= 2**-24


# -- our own configs


@every_sampler
@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}])
def test_save_and_load_keep_everything(name, changes, tmp_path):
    scheduler = make(name, **changes)
    cls = type(scheduler)
    scheduler.save_pretrained(tmp_path)
    wanted = sample(copy.deepcopy(scheduler), start(), nonlinear, 6, generator=seeded(1))
    for other in (
        cls.from_pretrained(tmp_path),
        cls.from_config(scheduler.config),
        cls.from_config(cls.load_config(tmp_path)),
        copy.deepcopy(scheduler),
    ):
        assert public(scheduler) == public(other)
        assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
        assert torch.equal(sample(other, start(), nonlinear, 6, generator=seeded(1)), wanted)
    pickled = pickle.loads(pickle.dumps(scheduler))
    assert public(scheduler) == public(pickled)
    assert torch.equal(pickled.alphas_cumprod, scheduler.alphas_cumprod)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert saved["rescale_betas_zero_snr"] is changes.get("rescale_betas_zero_snr", True)


def test_a_pickled_scheduler_samples():
    for name in SAMPLERS:
        scheduler = make(name)
        pickled = pickle.loads(pickle.dumps(scheduler))
        results = [sample(s, start(), nonlinear, 6, generator=seeded(1)) for s in (pickled, scheduler)]
        assert torch.equal(*results)


@every_class
@pytest.mark.parametrize("betas", [[0.1, 0.3], (0.1, 0.3), np.array([0.1, 0.3])], ids=["list", "tuple", "array"])
def test_trained_betas_are_kept(ours, betas, tmp_path):
    options = {"original_inference_steps": 2} if ours is ZeroSNRLCMScheduler else {}
    options |= {"rescale_betas_zero_snr": False, "prediction_type": "sample"}
    scheduler = ours(num_train_timesteps=2, trained_betas=betas, **options)
    scheduler.save_pretrained(tmp_path)
    for other in (scheduler, ours.from_pretrained(tmp_path), ours.from_config(scheduler.config)):
        torch.testing.assert_close(other.alphas_cumprod, torch.tensor([0.9, 0.63]))


@every_class
@pytest.mark.parametrize("source", CLASSES, ids=lambda c: c.__name__)
def test_from_one_of_ours_to_another_in_memory_keeps_every_choice(ours, source):
    chosen = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading", "prediction_type": "epsilon"}
    chosen |= {"clip_sample": True, "clip_sample_range": 3.0, "snr_shift_scale": 2.0, "num_train_timesteps": 500}
    first = source(**BETAS, **chosen)
    other = ours.from_config(first.config)
    assert {key: other.config[key] for key in chosen} == chosen
    assert other.config["_class_name"] == ours.__name__
    assert public(source.from_config(other.config)) == public(other) | public(first)
    assert ours.from_config(first.config, clip_sample_range=5.0).config["clip_sample_range"] == 5.0


def test_options_of_one_class_survive_the_config_of_another():
    options = {"solver_order": 3, "corrector": False, "eta": 0.5}
    there = ZeroSNRDDIMScheduler.from_config(ZeroSNRMultistepScheduler(**SD, **options).config)
    back = ZeroSNRMultistepScheduler.from_config(there.config)
    assert {key: back.config[key] for key in options} == options


@pytest.mark.full
@every_class
def test_there_and_back_through_every_compatible_stock_class(ours):
    """`trailing`, as stock has no `kappa`."""
    scheduler, tried = ours(timestep_spacing="trailing", **SD), 0
    for stock_cls in (c for c in scheduler.compatibles if "dummy" not in c.__module__):
        back = ours.from_config(stock_cls.from_config(scheduler.config).config, timestep_spacing="trailing")
        assert {key: back.config[key] for key in public(scheduler)} == public(scheduler), stock_cls
        tried += 1
    assert tried >= 12


@every_class
def test_unused_arguments_are_returned(ours):
    scheduler, unused = ours.from_config(DDIMScheduler(**SD).config, return_unused_kwargs=True, nothing=1)
    assert isinstance(scheduler, ours)
    assert unused == {"nothing": 1}


@every_class
def test_assigning_on_the_config_is_an_error_rather_than_a_half_change(ours, tmp_path):
    for assign in (setattr, lambda config, key, value: config.__setitem__(key, value)):
        scheduler = ours(**{**SD, "prediction_type": "sample"})
        assign(scheduler.config, "prediction_type", "v_prediction")
        for call in (lambda s: s.set_timesteps(5), lambda s: s.save_pretrained(tmp_path)):
            with pytest.raises(
                ValueError, match=r"prediction_type was assigned .*from_config\(scheduler.config, prediction"
            ):
                call(scheduler)


# -- bad configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type='flow' is unknown; choose one of epsilon"),
        ({"prediction_type": "epsilon"}, "zero signal-to-noise .* pass prediction_type='v_prediction'"),
        ({"timestep_spacing": "leading"}, "never visits the last timestep.*use 'trailing'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is unknown; choose one of trailing"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, "2 values for num_train_timesteps=3"),
        ({"beta_schedule": "quadratic"}, "beta_schedule='quadratic' is unknown; choose one of linear"),
        ({"snr_shift_scale": 0.0}, "snr_shift_scale=0.0 must be above 0; 1 changes nothing"),
    ],
)
@every_class
def test_bad_config_is_refused_when_it_is_made(ours, config, message):
    with pytest.raises(ValueError, match=message):
        ours(**{**SD, **config})

"""Guidance rescale in the pipelines of the installed diffusers that guide with a transformer.

What is compared stands in `guidance_pipelines.py`, what ought to come out in `guidance_oracle.py`.
"""

import functools
import inspect
import logging

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from guidance_oracle import build, errors, recorded
from guidance_pipelines import CONDITIONAL, NOT_HERE, TRANSFORMERS, called, examine, finding_row
from guided_pipelines import by_hand
from pages import guide
from small_pipelines import FLOW_PIPELINES
from third_parties import FLOW_WARNINGS, PIPELINE_WARNINGS

from zsnr_diffusers import FlowMatchMultistepScheduler, GuidanceError, enable_guidance_rescale, rescale_guidance
from zsnr_diffusers.guidance.layout import find_denoisers

TABLES = guide("pipelines")
pytestmark = [*PIPELINE_WARNINGS, *FLOW_WARNINGS]
NAMES = sorted(TRANSFORMERS)
ACTING = [name for name in NAMES if name not in NOT_HERE]
found_of = functools.cache(examine)


def installed(*names):
    """Those that the installed diffusers has."""
    return [name for name in names if name in FLOW_PIPELINES]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_at_zero_and_after_disabling_it_is_stock_s_bit_for_bit(name):
    found = found_of(name)
    assert found.same_at_zero
    assert found.same_after_disable
    assert found.same_calls


@pytest.mark.parametrize("name", NAMES)
def test_what_reaches_the_scheduler_is_algorithm_2(name):
    found = found_of(name)
    assert (found.reason is None) == (name not in NOT_HERE)
    # Where predictions are turned into x_0 and back, what that rounds away is divided by the last sigmas.
    assert found.error < (1e-5 if name == "Cosmos2TextToImagePipeline" else 1e-6)
    if found.reason is None:
        assert found.change > 4 * found.error
    if diffusers.__version__ == "0.42.1":
        assert finding_row(found) in TABLES


IN_STOCK = {
    name: "x_0" if name.startswith("LTX2") else "output"
    for name in ACTING
    if "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters
}
OTHER_IN_STOCK = {
    "LTXImageToVideoPipeline": "counts the frame that is given, which never reaches the scheduler",
    "LTX2ImageToVideoPipeline": "likewise",
}


@pytest.mark.parametrize("name", sorted({*IN_STOCK} - {*OTHER_IN_STOCK}))
def test_equals_stock_s_own(name):
    small = TRANSFORMERS[name]
    taken = inspect.signature(getattr(diffusers, name).__call__).parameters
    phi = dict.fromkeys([parameter for parameter in taken if parameter.endswith("guidance_rescale")], 0.7)
    stock = called(build(small), small._replace(arguments=lambda: {**small.arguments(), **phi}))
    ours = called(enable_guidance_rescale(build(small), 0.7, space=IN_STOCK[name], strict=True), small)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTING)
def test_a_guider_takes_the_place_of_the_pipeline_s_own_combination(name):
    small = TRANSFORMERS[name]
    stock = called(build(small), small)
    pipe = enable_guidance_rescale(build(small), guider=AdaptiveProjectedGuidance(3.0), strict=True)
    if "PAG" in name or (name.startswith("LTX2") and "HDR" not in name):
        with pytest.raises(GuidanceError, match="predictions, but a guider needs"):
            called(pipe, small)
    else:
        changed = called(pipe, small)
        assert bool(changed.isfinite().all())
        assert not torch.equal(changed, stock)


@pytest.mark.parametrize("name", installed("FluxPipeline", "HiDreamImagePipeline", "Ideogram4Pipeline", "WanPipeline"))
def test_a_guider_gets_what_the_network_returned_and_the_scheduler_its_result(name):
    """Separate calls and one batch; one of each is negated, and one transformer is two."""
    small = TRANSFORMERS[name]
    pipe = enable_guidance_rescale(build(small), guider=AdaptiveProjectedGuidance(3.0), strict=True)
    with recorded(pipe) as run:
        called(pipe, small)
    reference = AdaptiveProjectedGuidance(3.0)
    sign = -1 if name in ("HiDreamImagePipeline", "Ideogram4Pipeline") else 1
    for i, step in enumerate(run.steps):
        outputs = [output[0] for output in step.outputs]
        c, u = outputs if len(outputs) == 2 else outputs[0].chunk(2)[::-1]
        c, u = (x[:, -step.got.shape[1] :] for x in (c, u))
        expected = by_hand(reference, i, len(run.steps), torch.tensor(0.0), c, u)
        torch.testing.assert_close(step.got, sign * expected, rtol=1e-6, atol=1e-6)


SPACES = ["FluxPipeline", "StableDiffusion3Pipeline", "MochiPipeline", "WanPipeline", "SanaPipeline"]


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize("name", SPACES)
def test_in_the_space_of_the_image_it_is_algorithm_2_on_x_0(name, ours):
    """x_0 = x_s - s velocity; s is read off what the network is told, time from noise to data for Mochi."""
    small = TRANSFORMERS[name]
    pipe = build(small)
    if ours:
        pipe.scheduler = FlowMatchMultistepScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    enable_guidance_rescale(pipe, 0.7, space="x_0", strict=True)
    told = []
    for denoiser in find_denoisers(pipe):
        denoiser.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    with recorded(pipe) as run:
        called(pipe, small)
    inverted = name == "MochiPipeline"
    for i, step in enumerate(run.steps):
        t = float(told[i * len(step.outputs)].flatten()[0]) / (1 if name == "FluxPipeline" else 1000)
        outputs = [output[0].double() for output in step.outputs]
        c, u = outputs if len(outputs) == 2 else outputs[0].chunk(2)[::-1]
        scale = small.arguments().get("true_cfg_scale", small.arguments().get("guidance_scale"))
        s, sign = (1 - t, -1) if inverted else (t, 1)
        x_0, of_c = (step.sample - s * sign * v for v in (u + scale * (c - u), c))
        expected = sign * (step.sample - rescale_guidance(x_0, of_c, 0.7)) / s
        torch.testing.assert_close(step.got.double(), expected, rtol=2e-3, atol=2e-3)  # UniPC's t is a whole number


@pytest.mark.parametrize("name", installed("ZImagePipeline", "Lumina2Pipeline"))
def test_a_length_that_a_pipeline_sets_by_an_option(name):
    small = TRANSFORMERS[name]
    other = small._replace(arguments=lambda: {**small.arguments(), "cfg_normalization": name == "ZImagePipeline"})
    for each in (small, other):
        pipe = enable_guidance_rescale(build(each), 0.7, strict=True)
        with recorded(pipe) as run:
            called(pipe, each)
        assert errors(each, run, 0.7, CONDITIONAL.get(name))[0] < 1e-6


def test_a_scheduler_of_another_kind_has_no_spaces():
    small = FLOW_PIPELINES["SanaSprintPipeline"]
    with pytest.raises(ValueError, match="SCMScheduler has neither a variance-preserving schedule nor flow times"):
        called(enable_guidance_rescale(build(small), space="x_0"), small)


@pytest.mark.parametrize("name", installed("FluxFillPipeline", "Flux2Pipeline"))
def test_where_the_scale_is_an_input_of_the_network_there_is_nothing_to_rescale(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("zsnr_diffusers"), "propagate", True)
    small = FLOW_PIPELINES[name]
    assert torch.equal(called(enable_guidance_rescale(build(small)), small), called(build(small), small))
    assert "or the scale is an input of the network" in caplog.text
    with pytest.raises(GuidanceError, match="the scale is an input of the network"):
        called(enable_guidance_rescale(build(small), strict=True), small)


@pytest.mark.parametrize("name", ["MochiPipeline", "SanaPipeline", "WanPipeline"])
def test_half_precision(name):
    """Of small networks whose two predictions differ by more than bfloat16 rounds."""
    small = TRANSFORMERS[name]
    pipe = enable_guidance_rescale(build(small).to(torch.bfloat16), strict=True)
    result = called(pipe, small)
    assert bool(result.isfinite().all())
    assert not torch.equal(result, called(build(small).to(torch.bfloat16), small))


def test_nine_in_ten():
    assert len(ACTING) >= 0.9 * len(NAMES)

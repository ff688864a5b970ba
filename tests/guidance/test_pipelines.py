"""Guidance rescale in every UNet pipeline of the installed diffusers; what is compared stands in the script."""

import inspect

import diffusers
import pytest
import torch
from cases import thirds
from guidance_pipelines import CONDITIONAL, NOT_HERE, TRANSFORMERS, examine, finding_row, result
from pages import guide
from small_pipelines import PIPELINES
from third_parties import PIPELINE_WARNINGS

import zsnr_diffusers
from zsnr_diffusers import enable_guidance_rescale

TABLES = guide("pipelines")
pytestmark = PIPELINE_WARNINGS


@thirds(["name"], sorted(PIPELINES))
def test_rescale_acts_as_algorithm_2_and_leaves_nothing_behind(name):
    found = examine(name)
    if name in NOT_HERE:
        assert "no scheduler.step call uses the denoiser output" in found.reason
    else:
        assert found.reason is None
        assert found.same_calls
        assert found.change > 1e-3
        assert found.error < 1e-6  # float32 against float64
    assert found.same_at_zero
    assert found.same_after_disable
    if diffusers.__version__ == "0.42.1":
        assert finding_row(found) in TABLES


STOCK_IGNORES = ("StableDiffusionPanoramaPipeline", "TextToVideoZeroSDXLPipeline")
STOCK_CRASHES = ("StableDiffusionPAGInpaintPipeline",)
IN_STOCK = [
    name
    for name in sorted(PIPELINES)
    if "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters
]


def stock_result(name, **changes):
    small = PIPELINES[name]
    return result(small.build()(**small.arguments(), **changes))


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({*IN_STOCK} - {*STOCK_IGNORES, *STOCK_CRASHES}))
def test_equals_stock_s_own_and_both_together_are_one(name):
    small = PIPELINES[name]
    stock = stock_result(name, guidance_rescale=0.7)
    pipe = enable_guidance_rescale(small.build(), 0.7)
    torch.testing.assert_close(result(pipe(**small.arguments())), stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result(pipe(**small.arguments(), guidance_rescale=0.7)), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STOCK_IGNORES)
def test_stock_takes_the_argument_and_ignores_it(name):
    assert torch.equal(stock_result(name, guidance_rescale=0.7), stock_result(name))


@pytest.mark.parametrize("name", STOCK_CRASHES)
def test_stock_takes_the_argument_and_crashes(name):
    with pytest.raises(UnboundLocalError, match="noise_pred_text"):
        stock_result(name, guidance_rescale=0.7)


READY = [name for name in zsnr_diffusers.__all__ if name.startswith("ZeroSNR") and name.endswith("Pipeline")]


@pytest.mark.parametrize("name", READY)
def test_a_ready_class_is_stock_s_with_its_guidance(name):
    cls = getattr(zsnr_diffusers, name)
    stock = cls.__mro__[2]
    assert stock.__name__ == name.removeprefix("ZeroSNR")
    small = PIPELINES[stock.__name__]
    enabled = enable_guidance_rescale(
        small.build(), 0.7, keep_low_frequencies=cls.default_keep_low_frequencies, strict=True
    )
    options = {"requires_safety_checker": False, "add_watermarker": False}
    taken = inspect.signature(stock.__init__).parameters
    ready = cls(**enabled.components, **{key: value for key, value in options.items() if key in taken})
    ready.set_progress_bar_config(disable=True)
    assert torch.equal(result(ready(**small.arguments())), result(enabled(**small.arguments())))


def test_the_table_is_as_long_as_promised():
    assert len({*PIPELINES} - {*NOT_HERE}) >= 90
    if diffusers.__version__ == "0.42.1":
        assert {*NOT_HERE, *CONDITIONAL} <= {*PIPELINES, *TRANSFORMERS}

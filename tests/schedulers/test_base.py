"""The contract of a diffusers scheduler, kept by every sampler."""

import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from oracles import (
    BETAS,
    SAMPLERS,
    SD,
    levels,
    make,
    nonlinear,
    sample,
    seeded,
    start,
)

from zsnr_diffusers import ZeroSNRDDIMScheduler, ZeroSNRDDPMScheduler

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(4,), (2, 3), (4, 3, 8, 8), (1, 4, 3, 8, 8)]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


# -- what pipelines and users look for


@every_sampler
def test_public_attributes(name):
    scheduler, x = make(name), start()
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert scheduler.num_inference_steps is scheduler.begin_index is None
    assert scheduler.alphas_cumprod.shape == scheduler.timesteps.shape == (1000,)
    assert scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.scale_model_input(x, 0.0), x)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    assert (scheduler.num_inference_steps, scheduler.begin_index) == (5, 2)
    scheduler.set_timesteps(5)
    assert scheduler.begin_index is None  # a pipeline sets it after set_timesteps, for this run alone


@every_sampler
def test_config_is_frozen_and_other_attributes_are_free(name):
    scheduler = make(name)
    with pytest.raises(Exception, match="You cannot use ``update``"):
        scheduler.config.update(prediction_type="sample")
    scheduler.anything = 5
    assert scheduler.anything == 5
    with pytest.warns(FutureWarning, match="beta_start"):
        assert scheduler.beta_start == BETAS["beta_start"]
    with pytest.raises(AttributeError, match=f"'{type(scheduler).__name__}' object has no attribute 'nothing'"):
        _ = scheduler.nothing


# -- one step


@pytest.mark.parametrize("dtype", DTYPES)
@every_sampler
def test_half_precision_is_computed_in_float32(name, dtype):
    """Against float64: half an eps for the result, and float32's own rounding times the weights of the outputs."""
    scheduler, exact = make(name), make(name)
    for n in (1, 7, 50):
        scheduler.set_timesteps(n)
        exact.set_timesteps(n)
        for t, update in zip(scheduler.timesteps, scheduler._updates_from(0, scheduler._eta), strict=True):
            v, x, w = torch.randn(3, 2, 4, 8, 8).to(dtype)
            result = scheduler.step(v, t, x, variance_noise=w)
            wanted = exact.step(v.double(), t, x.double(), variance_noise=w.double())
            assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
            eps, weights = torch.finfo(dtype).eps, max(1.0, update.keep + sum(map(abs, update.gains)))
            torch.testing.assert_close(
                result.prev_sample.double(), wanted.prev_sample, rtol=eps, atol=max(eps / 100, 1e-6) * weights
            )


@pytest.mark.parametrize("shape", SHAPES)
@every_sampler
def test_shapes_and_both_kinds_of_result(name, shape):
    scheduler, again = make(name), make(name)
    scheduler.set_timesteps(4)
    again.set_timesteps(4)
    x = start(*shape)
    for t in scheduler.timesteps:
        v = nonlinear(x, float(t))
        result = scheduler.step(v, t, x, generator=seeded(1))
        as_tuple = again.step(v, t, x, generator=seeded(1), return_dict=False)
        assert result.prev_sample.shape == result.pred_original_sample.shape == shape
        assert len(as_tuple) == 2
        assert all(map(torch.equal, as_tuple, (result.prev_sample, result.pred_original_sample)))
        x = result.prev_sample


@every_sampler
def test_a_step_changes_none_of_its_arguments(name):
    scheduler = make(name, prediction_type="sample", clip_sample=True)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        v, x, w = torch.randn(3, 2, 3)
        copies = v.clone(), x.clone(), w.clone()
        scheduler.step(v, t, x, variance_noise=w)
        assert all(map(torch.equal, (v, x, w), copies))


@every_sampler
def test_step_reads_no_value_from_the_device(name):
    """A meta tensor has no values, so whatever would wait for one raises."""
    for config in ({}, {"clip_sample": True}, {"thresholding": True}):
        scheduler = make(name, **config)
        scheduler.set_timesteps(20, device="meta")
        x = torch.randn(1, 4, 8, 8, device="meta")
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(torch.empty_like(x), t, x, variance_noise=torch.empty_like(x)).prev_sample
        assert x.shape == (1, 4, 8, 8)
        noisy = scheduler.add_noise(x, torch.empty_like(x), scheduler.timesteps[3:4])
        assert noisy.device.type == "meta"


def test_views_of_the_timesteps_know_their_place():
    scheduler = ZeroSNRDDIMScheduler(**SD)
    scheduler.set_timesteps(20, device="meta")
    assert [scheduler._path_index(t) for t in scheduler.timesteps[5:]] == list(range(5, 20))
    scheduler.set_timesteps(20)
    assert [scheduler._path_index(t) for t in scheduler.timesteps.clone()[5:]] == list(range(5, 20))
    assert scheduler._path_index(999) == 0


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda t: torch.tensor([t])])
@every_sampler
def test_a_timestep_may_be_a_number_or_a_tensor(name, kind):
    scheduler, again = make(name), make(name)
    x, y = start(), start()
    for s in (scheduler, again):
        s.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(nonlinear(x, 1), t, x, generator=seeded(1)).prev_sample
        y = again.step(nonlinear(y, 1), kind(t.item()), y, generator=seeded(1)).prev_sample
    assert torch.equal(x, y)


def test_clipping_holds_each_predicted_x_0():
    scheduler = ZeroSNRDDIMScheduler(clip_sample=True, clip_sample_range=0.5, **{**SD, "prediction_type": "sample"})
    scheduler.set_timesteps(4)
    result = scheduler.step(torch.tensor([3.0, 0.1]), 999, torch.zeros(2))
    assert result.pred_original_sample.tolist() == pytest.approx([0.5, 0.1])
    x_s = scheduler.add_noise(torch.tensor([0.5, 0.1]), torch.zeros(2), torch.tensor([749]))
    torch.testing.assert_close(result.prev_sample, x_s)


@pytest.mark.parametrize("bounds", [{}, {"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_original_sample_is_that_of_a_step(dtype, prediction_type, bounds):
    """For any mixture of timesteps, up to rounding, which epsilon multiplies by 1 / 0.07 at the last of them."""
    zero = prediction_type != "epsilon"
    scheduler = make("ddim", prediction_type=prediction_type, rescale_betas_zero_snr=zero, **bounds)
    scheduler.set_timesteps(1000)
    t = torch.tensor([999, 0, 500, 17])
    output, x = (tensor.to(dtype) for tensor in torch.randn(2, 4, 3, 8, 8, generator=seeded(0)))
    found = scheduler.get_original_sample(output, x, t)
    steps = [scheduler.step(output[[i]], t[i], x[[i]]).pred_original_sample for i in range(4)]
    assert found.dtype == dtype
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(found, torch.cat(steps), rtol=torch.finfo(dtype).eps, atol=100 * arithmetic)


@pytest.mark.parametrize("bounds", [{"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "inverse"])
def test_no_result_leaves_the_bounds(name, bounds):
    """Not even that of a last step which draws a polynomial through bounded outputs."""
    scheduler = make(name, prediction_type="sample", **bounds)
    limit = bounds.get("clip_sample_range", 1.0)
    for n in (1, 2, 5, 20):
        result = sample(scheduler, start(), lambda x, t: 3 * torch.sin(t + x), n, generator=seeded(1))
        assert 0.05 < result.abs().max() <= limit


def test_generators_decide_the_noise_one_for_all_or_one_each():
    scheduler = ZeroSNRDDPMScheduler(**SD)
    scheduler.set_timesteps(5)
    x = torch.zeros(2, 3)

    def step(generator):
        return scheduler.step(x, 999, x, generator=generator).prev_sample

    assert torch.equal(step(seeded(3)), step(seeded(3)))
    assert not torch.equal(step(seeded(3)), step(seeded(4)))
    each = step([seeded(3), seeded(4)])
    assert torch.equal(step([seeded(4), seeded(3)]), each.flip(0))


# -- noising


@every_sampler
def test_noising_equals_stock(name):
    ours, stock = make(name, rescale_betas_zero_snr=False), DDIMScheduler(**SD)
    x, noise, t = torch.randn(1000, 4), torch.randn(1000, 4), torch.arange(1000)
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@every_sampler
def test_noising_is_right_in_every_dtype_and_shape(name, dtype):
    scheduler, t = make(name), torch.arange(0, 1000, 3)
    table = torch.tensor(levels(), dtype=torch.float64)
    for shape in SHAPES[1:]:
        x, noise = torch.randn(2, len(t), *shape[1:]).to(dtype)
        alpha, sigma = table[:, t].reshape(2, -1, *[1] * len(shape[1:]))
        wanted = alpha * x.double() + sigma * noise.double(), alpha * noise.double() - sigma * x.double()
        results = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        for result, exact in zip(results, wanted, strict=True):
            assert result.dtype == dtype
            torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    one = scheduler.add_noise(x, noise, torch.tensor([500]))
    assert torch.equal(one, scheduler.add_noise(x, noise, torch.tensor([500] * len(t))))
    assert torch.equal(scheduler.add_noise(x, noise, torch.tensor([999])), noise)


# -- misuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: s.step(torch.ones(1), 999, torch.ones(1)),
            r"Call set_timesteps\(num_inference_steps\) before step",
        ),
        (lambda s: s.set_timesteps(0), "num_inference_steps=0 .* from 1 to 1000"),
        (lambda s: s.set_timesteps(-1), "num_inference_steps=-1 .* from 1 to 1000"),
        (lambda s: s.set_timesteps(1001), "num_inference_steps=1001 .* from 1 to 1000"),
        (lambda s: s.set_timesteps(), "either num_inference_steps or timesteps"),
        (lambda s: s.set_timesteps(3, timesteps=[5]), "either num_inference_steps or timesteps"),
        (lambda s: s.set_timesteps(timesteps=[]), r"timesteps=\[\] must be one or more integers"),
        (lambda s: s.set_timesteps(timesteps=[9, 3.5]), r"timesteps=\[9, 3.5\] must be one or more integers"),
        (lambda s: s.set_timesteps(timesteps=[1000, 5]), r"\[1000\] lie outside \[0, 999\]"),
        (lambda s: s.set_timesteps(timesteps=[5, -1]), r"\[-1\] lie outside \[0, 999\]"),
        (lambda s: s.set_timesteps(timesteps=[9, 9]), "timesteps must (de|in)crease strictly; 9 follows 9"),
        (
            lambda s: s.set_timesteps(timesteps=[3, 9, 5]),
            "timesteps must (decrease strictly; 9|increase strictly; 5) foll",
        ),
        (
            lambda s: s.add_noise(torch.ones(1), torch.ones(1), torch.tensor([1000])),
            r"\[1000\] must lie in \[0, 999\]",
        ),
        (lambda s: s.add_noise(torch.ones(1), torch.ones(1), torch.tensor([-1])), r"\[-1\] must lie in \[0, 999\]"),
        (
            lambda s: s.get_original_sample(torch.ones(1), torch.ones(1), torch.tensor([1000])),
            r"\[1000\] must lie in \[0, 999\]",
        ),
        (lambda s: (s.set_timesteps(10), s.step(torch.ones(1), 998, torch.ones(1))), "timestep 998 .* among the 10"),
        (
            lambda s: (
                s.set_timesteps(10),
                s.step(torch.ones(1), 999, torch.ones(1), generator=torch.Generator(), variance_noise=torch.ones(1)),
            ),
            "either generator or variance_noise, not both",
        ),
    ],
)
@every_sampler
def test_misuse_is_named(name, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(name))


@pytest.mark.parametrize("eta", [2, -0.1, 1.1])
def test_eta_outside_the_unit_interval_is_refused_at_the_step(eta):
    scheduler = make("ddim")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=rf"eta={eta} must lie in \[0, 1\]"):
        scheduler.step(torch.ones(1), 999, torch.ones(1), eta=eta)


@pytest.mark.full
def test_the_class_itself_takes_little_to_import():
    """A scheduler alone must not wait for transformers."""
    code = "import sys, zsnr_diffusers; print('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_leading_at_zero_snr_is_refused_with_what_to_do():
    remedy = "use 'trailing', or rescale_betas_zero_snr=False to sample a model that was not retrained"
    with pytest.raises(ValueError, match=f"'leading' never visits the last timestep.*{remedy}"):
        make("ddim", timestep_spacing="leading")
    make("ddim", timestep_spacing="leading", rescale_betas_zero_snr=False)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_the_first_timesteps_beyond_the_schedule_are_refused(timestep):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=rf"timesteps \[{timestep}\] must lie in \[0, 999\]"):
        make("ddim").add_noise(x, x, torch.tensor([timestep]))


def test_a_number_of_steps_and_timesteps_together_are_refused_in_words():
    with pytest.raises(
        ValueError, match=r"^Pass either num_inference_steps or timesteps or sigmas to set_timesteps\.$"
    ):
        make("ddim").set_timesteps(4, timesteps=[999, 500])


def test_noise_of_ddim_is_drawn_by_the_generator():
    scheduler, x = make("ddim"), torch.zeros(2, 4, 8, 8)
    scheduler.set_timesteps(4)

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        return scheduler.step(x, scheduler.timesteps[0], x, eta=1.0, generator=generator).prev_sample

    assert torch.equal(step(1), step(1))
    assert not torch.equal(step(1), step(2))


@pytest.mark.parametrize("strength", [0.0, 1.01, 1.5, -0.5])
def test_a_strength_that_is_no_share_is_refused(strength):
    with pytest.raises(ValueError, match=rf"strength={strength} must lie in \(0, 1\]"):
        make("lcm").set_timesteps(2, strength=strength)


def test_lcm_may_have_been_distilled_at_one_timestep():
    scheduler = make("lcm")
    scheduler.set_timesteps(1, original_inference_steps=1)
    assert scheduler.timesteps.tolist() == [999]
    with pytest.raises(ValueError, match="original_inference_steps=0"):
        scheduler.set_timesteps(1, original_inference_steps=0)

"""Flow matching: point masses at every step count, stock where stock is right, and the contract of pipelines."""

import inspect
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.cogview4.pipeline_cogview4 import retrieve_timesteps as cogview4_timesteps
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps

from zsnr_diffusers import FlowMatchEulerScheduler, FlowMatchMultistepScheduler, ZeroSNRDDIMScheduler
from zsnr_diffusers.core.flow import kappa_times, shifted_time, trailing_times
from zsnr_diffusers.schedulers import ZeroSNRMultistepScheduler

CLASSES = [FlowMatchMultistepScheduler, FlowMatchEulerScheduler]
POINT = 1.75


def to_the_point(scheduler, x, timesteps=None):
    """Follow a perfect network of data that is one point; the same arithmetic as a network in the sample's dtype."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        s = t.double() / 1000
        velocity = ((x.double() - POINT) / s).to(x.dtype)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x


def gaussian(std):
    """A perfect network of N(0, std^2)."""

    def network(x, t):
        s = float(t) / 1000
        x_0 = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2) * x
        return (x - x_0) / s

    return network


def follow(scheduler, x, network, **kwargs):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **kwargs)[0]
    return x


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "numbers",
    [range(1, 40), [61, 103, 121, 250, 501, 981, 999, 1000], pytest.param(range(1, 1001), marks=pytest.mark.slow)],
)
def test_point_mass_is_reached_in_every_number_of_steps(cls, dtype, tolerance, numbers):
    for n in numbers:
        scheduler = cls()
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert scheduler.timesteps[0] == 1000
        found = to_the_point(scheduler, noise(1, 3, dtype=dtype))
        assert float((found.double() - POINT).abs().max()) < tolerance


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("n", [1, 2, 7, 28])
def test_euler_is_stocks_on_the_same_sigmas(n, shift):
    sigmas = [1 - 0.9 * i / n for i in range(n)]
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=shift), FlowMatchEulerScheduler(shift=shift)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=0)
    x = noise(2, 5, dtype=torch.float32)
    torch.testing.assert_close(follow(ours, x, gaussian(2)), follow(stock, x, gaussian(2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"time_shift_type": "linear"}, {"shift_terminal": 0.1}])
def test_dynamic_shifting_is_stocks(options):
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    ours = FlowMatchEulerScheduler(use_dynamic_shifting=True, **options)
    sigmas = np.linspace(1.0, 1 / 9, 9)
    for scheduler in (stock, ours):
        retrieve_timesteps(scheduler, 9, "cpu", sigmas=sigmas, mu=0.8)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=1e-7)


def test_stock_visits_its_steps_unevenly_and_wastes_the_last_one_where_ours_does_not():
    """https://github.com/huggingface/diffusers/issues/13243: sigma_min is shifted twice."""
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerScheduler(shift=3.0)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(4)
    assert float(stock.sigmas[3]) < 0.01
    wanted = [shifted_time(s, 3.0) for s in (1.0, 0.75, 0.5, 0.25)]
    assert ours.sigmas.tolist() == pytest.approx([*wanted, 0.0])


@pytest.mark.skipif(
    "randn_like" in inspect.getsource(FlowMatchEulerDiscreteScheduler.step), reason="older diffusers ignore generators"
)
@pytest.mark.parametrize("seed", [0, 1])
def test_distilled_models_are_sampled_as_stock_does(seed):
    sigmas = trailing_times(4)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    ours = FlowMatchMultistepScheduler.from_config(stock.config)
    assert ours.config.stochastic_sampling
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=sigmas)
    x, found = noise(2, 5, dtype=torch.float32), []
    for scheduler in (stock, ours):
        found.append(follow(scheduler, x, gaussian(2), generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_inverted_time_is_stocks():
    """Mochi counts from noise to data, and its network predicts x_0 - noise."""
    stock = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    ours = FlowMatchEulerScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.3])
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    torch.testing.assert_close(ours.sigmas, stock.sigmas)

    def network(x, t):
        return -gaussian(2)(x, 1000 - t)

    x = noise(2, 5, dtype=torch.float32)
    torch.testing.assert_close(follow(ours, x, network), follow(stock, x, network), rtol=0, atol=1e-5)


def test_tokens_that_are_cleaner_follow_stock_and_the_others_the_sampler():
    sigmas, x = [1.0, 0.7, 0.4], noise(2, 6, 3, dtype=torch.float32)
    stock, ours = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerScheduler()
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=sigmas)
        sample = x
        for t in scheduler.timesteps:
            tokens = torch.full((2, 6), float(t))
            tokens[:, 0], tokens[:, 1] = 0.0, min(float(t), 500.0)
            sample = scheduler.step(sample * 0.3, t, sample, per_token_timesteps=tokens, return_dict=False)[0]
        results.append(sample)
    torch.testing.assert_close(results[1], results[0])
    assert torch.equal(results[1][:, 0], x[:, 0])


@pytest.mark.parametrize("n", [4, 8, 20])
@pytest.mark.parametrize("std", [0.3, 1.0, 6.0])
def test_nearer_to_the_exact_flow_than_stock_at_any_of_its_shifts(n, std):
    x = noise(1, 1)
    ours = FlowMatchMultistepScheduler()
    ours.set_timesteps(n)
    error = abs(float(follow(ours, x, gaussian(std)) / (std * x)) - 1)
    for shift in (1.0, 3.0):
        stock = FlowMatchEulerDiscreteScheduler(shift=shift)
        stock.set_timesteps(n)
        assert error < 0.5 * abs(float(follow(stock, x.float(), gaussian(std)) / (std * x)) - 1)


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        SASolverScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda stock: type(stock).__name__,
)
@pytest.mark.parametrize("cls", CLASSES)
def test_any_flow_config_of_stock_is_taken(stock, cls):
    ours = cls.from_config(stock.config)
    assert ours.shift == 3.0
    assert ours.config.prediction_type == "flow_prediction"
    as_saved = cls.from_config({**stock.config, "_class_name": type(stock).__name__})
    assert as_saved.config == ours.config


def test_a_distilled_config_keeps_the_flow_times_that_it_was_distilled_at():
    ours = FlowMatchMultistepScheduler.from_config(FlowMatchLCMScheduler(shift=3.0).config)
    assert ours.config.stochastic_sampling
    ours.set_timesteps(4)
    assert ours.sigmas[:-1].tolist() == pytest.approx(trailing_times(4, 3.0))


def test_other_spacings_of_stock_are_left_out_with_a_word(caplog):
    stock = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with caplog.at_level("WARNING"):
        FlowMatchMultistepScheduler.from_config(stock.config)
    assert "use_karras_sigmas=True" in caplog.text


@pytest.mark.parametrize("cls", CLASSES)
def test_a_config_survives_saving_and_stock(cls, tmp_path):
    ours = cls(shift=2.5, use_dynamic_shifting=True, max_shift=1.3)
    ours.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config == ours.config
    stock = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert (stock.shift, stock.config.use_dynamic_shifting, stock.config.max_shift) == (2.5, True, 1.3)
    assert cls.from_config(stock.config).shift == 2.5


def test_models_with_betas_and_flow_models_name_each_others_scheduler():
    with pytest.raises(
        ValueError, match=r"not for flow-matching models; if it has betas, use ZeroSNRMultistepScheduler"
    ):
        FlowMatchMultistepScheduler.from_config(ZeroSNRDDIMScheduler().config)
    for stock in (
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ):
        with pytest.raises(ValueError, match=r"flow-matching model.* no betas; .*FlowMatchMultistepScheduler"):
            ZeroSNRMultistepScheduler.from_config(stock.config)


def test_what_a_pipeline_passes_by_itself_is_a_number_of_steps():
    """Pipelines pass linspace(1, 1 / n, n) where their caller passes nothing."""
    scheduler = FlowMatchMultistepScheduler(use_dynamic_shifting=True)
    retrieve_timesteps(scheduler, 6, "cpu", sigmas=np.linspace(1.0, 1 / 6, 6), mu=0.9)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(kappa_times(6))


def test_a_rounded_timestep_is_the_nearest():
    """SkyReelsV2DiffusionForcingPipeline keeps them as whole numbers."""
    scheduler = FlowMatchMultistepScheduler()
    scheduler.set_timesteps(6)
    for index, t in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(int(t)) == index
    with pytest.raises(ValueError, match="timestep 3 is not among the 6"):
        scheduler.index_for_timestep(3)


def test_dynamic_shifting_needs_no_mu_where_the_spacing_needs_no_shift():
    """BriaPipeline passes it to schedulers of stock's class alone."""
    scheduler = FlowMatchMultistepScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=trailing_times(5))
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(kappa_times(5))
    with pytest.raises(ValueError, match="use_dynamic_shifting=True: pass mu"):
        scheduler.set_timesteps(sigmas=[1.0, 0.3])


def test_what_a_caller_asks_for_is_taken_and_shifted_as_stock_does():
    scheduler = FlowMatchMultistepScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([shifted_time(s, 3.0) for s in (1.0, 0.6, 0.2)])


def test_trailing_asks_for_the_flow_times_that_models_were_distilled_at():
    scheduler = FlowMatchMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]


def test_the_network_may_be_told_of_flow_times_before_the_shift():
    """CogView4 passes both; its network counts timesteps before the shift."""
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    ours = FlowMatchEulerScheduler.from_config(stock.config)
    timesteps = np.array([1000.0, 700.0, 300.0])
    for scheduler in (stock, ours):
        cogview4_timesteps(scheduler, 3, "cpu", timesteps=timesteps, sigmas=timesteps / 1000, mu=2.0)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatchMultistepScheduler(shift=0.0), "shift=0.0 must be above 0"),
        (lambda: FlowMatchMultistepScheduler(shift=-3.0), "shift=-3.0 must be above 0"),
        (lambda: FlowMatchMultistepScheduler().set_shift(0), "shift=0 must be above 0"),
        (lambda: FlowMatchMultistepScheduler(solver_order=4), "solver_order=4"),
        (lambda: FlowMatchMultistepScheduler(eta=1.5), "eta=1.5"),
        (lambda: FlowMatchMultistepScheduler(time_shift_type="cubic"), "time_shift_type='cubic'"),
        (
            lambda: FlowMatchMultistepScheduler(timestep_spacing="leading"),
            "'leading' is not available.*kappa or trailing",
        ),
        (lambda: FlowMatchMultistepScheduler(prediction_type="epsilon"), "zero signal-to-noise ratio"),
        (lambda: FlowMatchMultistepScheduler().set_timesteps(), "Pass either num_inference_steps or sigmas"),
        (lambda: FlowMatchMultistepScheduler().set_timesteps(0), "num_inference_steps=0 must be an integer"),
        (lambda: FlowMatchMultistepScheduler().set_timesteps(3, sigmas=[1.0, 0.5]), "=3, but 2 flow times"),
        (lambda: FlowMatchMultistepScheduler().set_timesteps(sigmas=[0.5, 0.6]), "must decrease strictly"),
        (
            lambda: FlowMatchEulerScheduler(use_dynamic_shifting=True).set_timesteps(4),
            "use_dynamic_shifting=True: pass mu",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_first_sigma_below_1_is_kept_with_a_warning(caplog):
    scheduler = FlowMatchMultistepScheduler()
    with caplog.at_level("WARNING"):
        scheduler.set_timesteps(sigmas=[0.8, 0.4])
    assert scheduler.sigmas.tolist() == pytest.approx([0.8, 0.4, 0.0])
    assert "The first sigma is 0.8: sampling assumes signal that pure noise does not contain" in caplog.text


def test_mu_without_dynamic_shifting_is_not_used_and_said_to_be(caplog):
    """As in stock, since HiDreamImagePipeline passes it to every scheduler."""
    scheduler = FlowMatchEulerScheduler()
    with caplog.at_level("WARNING"):
        scheduler.set_timesteps(4, mu=0.71)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert "mu=0.71 is ignored because the config does not use dynamic shifting" in caplog.text


def test_mu_beside_a_pipelines_own_sigmas_is_left_unread_without_dynamic_shifting():
    """FluxPipeline passes it to schnell's scheduler too, which has none."""
    scheduler = FlowMatchMultistepScheduler(timestep_spacing="trailing")
    retrieve_timesteps(scheduler, 4, "cpu", sigmas=np.linspace(1.0, 0.25, 4), mu=0.7)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("begin", [0, 3, 9])
def test_a_run_may_begin_anywhere(cls, begin):
    """As image-to-image does: noised by `scale_noise`, from a timestep in the middle."""
    scheduler = cls()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(begin)
    t = scheduler.timesteps[begin : begin + 1]
    x = scheduler.scale_noise(torch.full((1, 4), POINT, dtype=torch.float64), t, noise(1, 4))
    s = float(scheduler.sigmas[begin])
    torch.testing.assert_close(x, (1 - s) * POINT + s * noise(1, 4), rtol=0, atol=1e-6)
    assert float((to_the_point(scheduler, x, scheduler.timesteps[begin:]) - POINT).abs().max()) < 1e-5


def test_noise_is_stocks_for_a_batch():
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchMultistepScheduler(shift=3.0)
    x, e, t = noise(3, 2, 4, 4), noise(3, 2, 4, 4).flip(0), stock.timesteps[[0, 500, 999]]
    torch.testing.assert_close(ours.timesteps[[0, 500, 999]], t, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.scale_noise(x, t, e), stock.scale_noise(x, t, e), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.add_noise(x, e, t), ours.scale_noise(x, t, e))
    assert ours.add_noise(x.half(), e.half(), t).dtype == torch.float16


@pytest.mark.parametrize(("eta", "order"), [(0.5, 1), (1.0, 1), (1.0, 2), (1.0, 3)])
def test_the_sde_keeps_the_variance_of_gaussian_data(eta, order):
    scheduler = FlowMatchMultistepScheduler(eta=eta, solver_order=order)
    scheduler.set_timesteps(40)
    found = follow(scheduler, noise(1, 20_000), gaussian(1.5), generator=torch.Generator().manual_seed(0))
    assert float(found.std()) == pytest.approx(1.5, abs=4 * 1.5 / math.sqrt(2 * 20_000) + 0.02)


def test_nothing_is_stepped_before_timesteps_are_chosen_or_at_others():
    scheduler = FlowMatchMultistepScheduler()
    x = noise(1, 2)
    with pytest.raises(ValueError, match="Call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep 1\.5 is not among the 4"):
        scheduler.step(x, 1.5, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_samples_dtype(dtype):
    scheduler = FlowMatchMultistepScheduler()
    scheduler.set_timesteps(3)
    x = noise(1, 4, dtype=dtype)
    output = scheduler.step(x, scheduler.timesteps[0], x)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert scheduler.step_index == 1
    assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 1


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5]])
def test_flow_times_from_one_on_start_from_noise(sigmas, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("zsnr_diffusers"), "propagate", True)
    FlowMatchMultistepScheduler().set_timesteps(sigmas=sigmas)
    assert "The first sigma" not in caplog.text
    FlowMatchMultistepScheduler().set_timesteps(sigmas=[0.9, 0.5])
    assert "The first sigma is 0.9" in caplog.text

"""The ComfyUI nodes: the same samples as the schedulers give, through ComfyUI's interfaces."""

import importlib
import json
import sys
from pathlib import Path

import comfyui
import pytest
import torch
from exact_denoisers import Gaussian, Mixture
from pages import ROOT
from safetensors.torch import save_file
from small_stable_diffusion import flawed_scheduler

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRMultistepScheduler
from zsnr_diffusers.core import classifier_free_guidance, keep_low_frequencies

SPREAD = torch.logspace(-1, 1, 8, dtype=torch.float64)
DATA = {
    "gaussian": Gaussian("gaussian", SPREAD, mean=0.5),  # from a mean of 0 the first x_0 has no direction to compare
    "mixture": Mixture(
        "mixture",
        torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    ),
}


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """The node pack, loaded as ComfyUI loads a folder of `custom_nodes`."""
    comfyui.install(monkeypatch, tmp_path)
    init = Path(ROOT, "examples", "comfyui", "__init__.py")
    spec = importlib.util.spec_from_file_location("node_pack", init, submodule_search_locations=[str(init.parent)])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "node_pack", module)
    spec.loader.exec_module(module)
    yield module.nodes
    for name in [name for name in sys.modules if name.startswith("node_pack.")]:
        del sys.modules[name]


def sampling_of(prediction_type, zero_snr=False):
    kinds = importlib.import_module("comfy.model_sampling")
    if prediction_type == "flow_prediction":
        return type("Sampling", (kinds.ModelSamplingDiscreteFlow, kinds.CONST), {})()
    scaling = {"epsilon": kinds.EPS, "v_prediction": kinds.V_PREDICTION}[prediction_type]
    return type("Sampling", (kinds.ModelSamplingDiscrete, scaling), {})(StableDiffusion(), zsnr=zero_snr)


class StableDiffusion:
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}  # noqa: RUF012


def network_of(scheduler, data):
    """The exact network of a scheduler's model on `data`, as a function of sample and timestep."""
    kind = scheduler.config["prediction_type"]

    def network(x, timestep):
        t = timestep.reshape(1) if kind == "flow_prediction" else timestep.reshape(1).long()
        level = scheduler.noise_level(t, x.double())
        alpha, sigma = level.alpha.flatten()[0], level.sigma.flatten()[0]
        x_0 = data.x_0(x.double().flatten(1) / sigma, (alpha / sigma).item()).reshape(x.shape)
        noise = (x - alpha * x_0) / sigma
        return {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x_0,
            "flow_prediction": noise - x_0,
        }[kind].to(x.dtype)

    return network


def scheduler_of(prediction_type, zero_snr, **options):
    if prediction_type == "flow_prediction":
        return FlowMatchMultistepScheduler(**options)
    return ZeroSNRMultistepScheduler.from_config(
        flawed_scheduler().config, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, **options
    )


def noise_of(dtype=torch.float64):
    return torch.randn(16, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


MODELS = [("v_prediction", True), ("flow_prediction", False), ("v_prediction", False), ("epsilon", False)]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize(("prediction_type", "zero_snr"), MODELS)
def test_samples_equal_those_of_the_scheduler(nodes, prediction_type, zero_snr, n, data):
    scheduler = scheduler_of(prediction_type, zero_snr, solver_order=3)
    scheduler.set_timesteps(n)
    network, noise = network_of(scheduler, DATA[data]), noise_of()
    expected = noise
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, t), t, expected).prev_sample

    guider = comfyui.Guider(sampling_of(prediction_type, zero_snr), network)
    (sigmas,) = nodes.ZeroSNRKappaScheduler().get_sigmas(guider.model_patcher, n, 1.0)
    (sampler,) = nodes.ZeroSNRMultistepSampler().get_sampler(solver_order=3, eta=0.0)
    extra = {"seed": 0, "model_options": {}}
    found = sampler.sample(guider, sigmas, extra, None, noise.clone(), torch.zeros_like(noise))
    error = ((found - expected).flatten(1) / DATA[data].spread).abs().max()
    # At zero SNR ComfyUI's x_0 of the first step has 2.2e-4 of the noise, which is up to 4, in modes of size 0.1. The
    # rest is float32 of sigmas and flow times.
    assert error < (0.01 if zero_snr else 1e-4)


@pytest.mark.parametrize("n", range(1, 41))
@pytest.mark.parametrize("zero_snr", [True, False])
def test_sigmas_are_those_of_the_scheduler(nodes, zero_snr, n):
    sampling = sampling_of("v_prediction", zero_snr)
    (sigmas,) = nodes.ZeroSNRKappaScheduler().get_sigmas(comfyui.Patcher(sampling), n, 1.0)
    scheduler = scheduler_of("v_prediction", zero_snr)
    scheduler.set_timesteps(n)
    assert sampling.timestep(sigmas[:-1]).tolist() == scheduler.timesteps.tolist()
    assert sigmas[-1] == 0


def test_denoise_takes_the_last_steps(nodes):
    patcher = comfyui.Patcher(sampling_of("flow_prediction"))
    (every,), (some,) = (nodes.ZeroSNRKappaScheduler().get_sigmas(patcher, n, d) for n, d in ((20, 1.0), (10, 0.5)))
    assert torch.equal(some, every[-11:])
    assert nodes.ZeroSNRKappaScheduler().get_sigmas(patcher, 10, 0.0)[0].numel() == 0


def test_fresh_noise_is_seeded_as_in_comfyui_and_a_run_may_stop_early(nodes):
    scheduler = scheduler_of("flow_prediction", False, eta=1.0)
    scheduler.set_timesteps(6)
    network, x = network_of(scheduler, DATA["gaussian"]), noise_of()
    generator, expected = torch.Generator().manual_seed(8), x
    for t in scheduler.timesteps[:4]:
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        expected = scheduler.step(network(expected, t), t, expected, variance_noise=fresh).prev_sample
    guider = comfyui.Guider(sampling_of("flow_prediction"), network)
    (sigmas,) = nodes.ZeroSNRKappaScheduler().get_sigmas(guider.model_patcher, 6, 1.0)
    (sampler,) = nodes.ZeroSNRMultistepSampler().get_sampler(solver_order=2, eta=1.0)
    seen = []
    found = sampler.sample(
        guider,
        sigmas[:5],
        {"seed": 7, "model_options": {}},
        lambda i, x_0, x, n: seen.append((i, n)),
        x.clone(),
        torch.zeros_like(x),
    )
    torch.testing.assert_close(found * (1 - sigmas[4]), expected, rtol=1e-4, atol=1e-5)  # flow times in float32
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def checkpoint(folder, keys=(), metadata=None):
    """Write `model.safetensors` of a Stable Diffusion 1.x, with these empty keys and metadata and one weight."""
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save_file(weights | {key: torch.empty(0) for key in keys}, folder / "model.safetensors", metadata)


@pytest.mark.parametrize(
    ("keys", "metadata", "prediction_type", "zero_snr"),
    [
        ({"v_pred", "ztsnr"}, None, "v_prediction", True),
        ({"v_pred"}, None, "v_prediction", False),
        ((), {"prediction_type": "epsilon"}, "epsilon", False),
        ((), {"modelspec.noise_process": "flow"}, "flow_prediction", False),
    ],
)
def test_sampling_is_what_the_checkpoint_records(nodes, tmp_path, keys, metadata, prediction_type, zero_snr):
    checkpoint(tmp_path, keys, metadata)
    model = comfyui.Patcher(sampling_of("epsilon"))
    patched, found = nodes.ZeroSNRModelSampling().patch(model, "model.safetensors")
    assert found.startswith(f"model.safetensors: {prediction_type}")
    assert ("zero terminal SNR" in found) == zero_snr
    sampling, wanted = patched.get_model_object("model_sampling"), sampling_of(prediction_type, zero_snr)
    assert torch.equal(sampling.sigmas, wanted.sigmas)
    assert type(sampling).__bases__ == type(wanted).__bases__
    assert model.get_model_object("model_sampling") is model.model.model_sampling


def test_a_checkpoint_that_records_nothing_is_left_alone(nodes, tmp_path):
    checkpoint(tmp_path)
    model = comfyui.Patcher(sampling_of("epsilon"))
    patched, found = nodes.ZeroSNRModelSampling().patch(model, "model.safetensors")
    assert patched is model
    assert "does not record what it predicts" in found


def test_kept_frequencies_are_the_same_in_x_0_as_in_the_network_s_output(nodes):
    (model,) = nodes.KeepLowFrequenciesGuidance().patch(comfyui.Patcher(None), 2)
    generator, sigma = torch.Generator().manual_seed(0), 3.0
    x, cond, uncond = torch.randn(3, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    guided = keep_low_frequencies(classifier_free_guidance(uncond, cond, 7.5), cond, 2)
    x_0 = {"cond_denoised": x - sigma * cond, "uncond_denoised": x - sigma * uncond}
    denoised = classifier_free_guidance(x_0["uncond_denoised"], x_0["cond_denoised"], 7.5)
    (function,) = model.post_cfg
    torch.testing.assert_close(function({"denoised": denoised, **x_0}), x - sigma * guided)


def test_the_workflow_has_the_inputs_of_its_nodes(nodes):
    workflow = json.loads(Path(ROOT, "examples", "comfyui", "workflow.json").read_text(encoding="utf-8"))
    ours = nodes.NODE_CLASS_MAPPINGS
    assert set(ours) <= {node["class_type"] for node in workflow.values()}
    for node in workflow.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(source in workflow for source, _ in links)
        if node["class_type"] in ours:
            assert set(node["inputs"]) == set(ours[node["class_type"]].INPUT_TYPES()["required"])

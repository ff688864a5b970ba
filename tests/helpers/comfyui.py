"""ComfyUI's interfaces as far as the nodes in `examples/comfyui` use them, written after ComfyUI 0.8.0.

A stand-in, since ComfyUI is no package and pulls in a web server; `samplers.KSAMPLER`, `model_sampling`,
`k_diffusion.sampling.default_noise_sampler` and `folder_paths` behave as there. With the path of a clone in the
environment variable `COMFYUI`, its own modules take their place, and the same tests run on them.
"""

import importlib
import os
import sys
from types import ModuleType, SimpleNamespace

import torch
from small_stable_diffusion import flawed_scheduler

from zsnr_diffusers.core import enforce_zero_terminal_snr

STAND_IN_FOR_ZERO = 4.8973451890853435e-08
"""alpha_bar that ComfyUI writes for 0."""


class _Scaling:
    """Samples x_0 + sigma noise, which the network reads with variance 1."""

    def calculate_input(self, sigma, noise):
        return noise / (sigma**2 + 1) ** 0.5

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class EPS(_Scaling):
    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma


class V_PREDICTION(_Scaling):  # noqa: N801  ComfyUI's name
    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5


class CONST:
    def calculate_input(self, sigma, noise):
        return noise

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class ModelSamplingDiscrete(torch.nn.Module):
    """Stable Diffusion's schedule."""

    def __init__(self, model_config=None, zsnr=None):
        super().__init__()
        alpha_bar = flawed_scheduler().alphas_cumprod
        if zsnr:
            alpha_bar = enforce_zero_terminal_snr(alpha_bar)
            alpha_bar[-1] = STAND_IN_FOR_ZERO
        self.zsnr = zsnr
        self.register_buffer("sigmas", ((1 - alpha_bar) / alpha_bar).sqrt().float())

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0)


class ModelSamplingDiscreteFlow(torch.nn.Module):
    """Flow time 0.001 to 1."""

    def __init__(self, model_config=None):
        super().__init__()
        self.register_buffer("sigmas", torch.arange(1, 1001) / 1000)

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def timestep(self, sigma):
        return sigma * 1000


class KSAMPLER:
    """Noises the latent, calls the sampler function, and hands on what it returns."""

    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image):
        sampling = model_wrap.inner_model.model_sampling
        all_noise = sigmas[0] > sampling.sigma_max * (1 - 1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, bool(all_noise))

        def model(x, sigma, seed=None, model_options=None, denoise_mask=None):
            return model_wrap(x, sigma, model_options=model_options, seed=seed)

        model.inner_model = model_wrap
        each = None if callback is None else lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)
        x = self.sampler_function(model, x, sigmas, extra_args, each, disable=True, **self.extra_options)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


def default_noise_sampler(x, seed=None):
    """Noise from a generator of its own; on CPUs ComfyUI adds 1, since the seed itself has made the first noise."""
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def install(monkeypatch, checkpoints):
    """Let `import comfy` find a clone of ComfyUI, or else the stand-in, and `folder_paths` files in `checkpoints`."""
    folders = ModuleType("folder_paths")
    folders.get_filename_list = lambda kind: sorted(os.listdir(checkpoints))
    folders.get_full_path_or_raise = lambda kind, name: os.path.join(checkpoints, name)
    if clone := os.environ.get("COMFYUI"):
        monkeypatch.syspath_prepend(clone)
        monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.samplers")
    else:
        own = {"CONST": CONST, "EPS": EPS, "V_PREDICTION": V_PREDICTION}
        own |= {"ModelSamplingDiscrete": ModelSamplingDiscrete, "ModelSamplingDiscreteFlow": ModelSamplingDiscreteFlow}
        modules = {
            "comfy": {},
            "comfy.samplers": {"KSAMPLER": KSAMPLER},
            "comfy.model_sampling": own,
            "comfy.k_diffusion": {},
            "comfy.k_diffusion.sampling": {"default_noise_sampler": default_noise_sampler},
        }
        for name, members in modules.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
            if parent := name.rpartition(".")[0]:
                setattr(sys.modules[parent], name.rpartition(".")[2], module)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)


class Patcher:
    """A MODEL: a network with its sampling, and the patches that nodes add to a clone."""

    def __init__(self, sampling, patches=()):
        self.model = SimpleNamespace(model_config=SimpleNamespace(sampling_settings={}), model_sampling=sampling)
        self.objects, self.post_cfg = dict(patches), []

    def clone(self):
        return Patcher(self.model.model_sampling, self.objects)

    def add_object_patch(self, name, value):
        self.objects[name] = value

    def get_model_object(self, name):
        return self.objects.get(name, getattr(self.model, name))

    def set_model_sampler_post_cfg_function(self, function):
        self.post_cfg.append(function)


class Guider:
    """What a sampler calls: x_0 of `(x, sigma)` by a network that takes `(input, timestep)`."""

    def __init__(self, sampling, network):
        self.model_patcher = Patcher(sampling)
        self.inner_model, self.network = self.model_patcher.model, network

    def __call__(self, x, sigma, model_options=None, seed=None):
        sampling, one = self.inner_model.model_sampling, sigma[0]
        output = self.network(sampling.calculate_input(one, x), sampling.timestep(sigma)[0])
        return sampling.calculate_denoised(one, output, x)

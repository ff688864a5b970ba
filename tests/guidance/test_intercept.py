"""What is done while a pipeline is called, and that nothing of it stays."""

import copy
import logging
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from guided_pipelines import clean, generate
from peft import LoraConfig
from tiny_pipelines import tiny_stable_diffusion, zero_snr_scheduler

from zsnr_diffusers import GuidanceError, ZeroSNRDDIMScheduler, enable_guidance_rescale, rescale_guidance
from zsnr_diffusers.guidance.intercept import GuidanceInterceptor, GuidanceSettings


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("zsnr_diffusers"), "propagate", True)
    return caplog


def said(log):
    return [record.getMessage() for record in log.records if "settings were not applied" in record.getMessage()]


class Looped(StableDiffusionPipeline):
    """A pipeline reduced to its loop, which subclasses guide in their own way."""

    @torch.no_grad()
    def __call__(self, prompt=None, guidance_scale=7.5, num_inference_steps=3):
        embeds, nothing = self.encode_prompt(["a cat"], "cpu", 1, True)
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            guided = self.guide(x, t, torch.cat([nothing, embeds]), guidance_scale)
            x = self.scheduler.step(guided, t, x).prev_sample
        return x

    def predict(self, x, t, embeds):
        return self.unet(torch.cat([x] * len(embeds)), t, encoder_hidden_states=embeds).sample


def looped(guide):
    cls = type("Looped", (Looped,), {"guide": guide, "__module__": "diffusers.of_the_tests"})
    return cls(**tiny_stable_diffusion().components, requires_safety_checker=False)


def stacked(self, x, t, embeds, w):
    u, c = self.predict(x, t, embeds).chunk(2)
    return u + w * (c - u)


def turned_round(self, x, t, embeds, w):
    c, u = self.predict(x, t, embeds.flip(0)).chunk(2)
    return torch.lerp(u, c, w)


def separate(self, x, t, embeds, w):
    u, c = self.predict(x, t, embeds[:1]), self.predict(x, t, embeds[1:])
    return u + w * (c - u)


def masked(self, x, t, embeds, w):
    u, c = self.predict(x, t, embeds).chunk(2)
    return u + w * (c - u) * (x > 0)


def unguided(self, x, t, embeds, w):
    return self.predict(x, t, embeds[1:])


def negated(self, x, t, embeds, w):
    return -stacked(self, x, t, embeds, w)


def of_one_length(self, x, t, embeds, w):
    u, c = self.predict(x, t, embeds).chunk(2)
    guided = u + w * (c - u)
    return guided * c.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)


def by_x_0(self, x, t, embeds, w):
    s = (1 + t / 1000) / 2
    u, c = (x - s * p for p in self.predict(x, t, embeds).chunk(2))
    return (x - u - w * (c - u)) / s + 0.1 * x


def test_neither_the_order_of_the_stack_nor_whether_there_is_one_matters():
    plain = enable_guidance_rescale(looped(stacked), strict=True)()
    torch.testing.assert_close(enable_guidance_rescale(looped(turned_round), strict=True)(), plain)
    torch.testing.assert_close(enable_guidance_rescale(looped(separate), strict=True)(), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, looped(stacked)())


@pytest.mark.full
@pytest.mark.parametrize("guide", [stacked, separate, negated, of_one_length, by_x_0])
def test_the_conditional_prediction_is_what_the_pipeline_hands_on_at_scale_1(guide):
    """A guider of scale 1 returns the conditional prediction."""
    guided = enable_guidance_rescale(looped(guide), guider=ClassifierFreeGuidance(1.0), strict=True)
    alone = looped(lambda self, x, t, embeds, w: guide(self, x, t, embeds, 1.0))
    torch.testing.assert_close(guided(), alone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("guide", "reason"),
    [(masked, "not a weighted sum"), (unguided, "guidance is off")],
    ids=["masked", "unguided"],
)
def test_where_it_cannot_act_it_says_so_once_and_changes_nothing(guide, reason, log):
    pipe, stock = enable_guidance_rescale(looped(guide)), looped(guide)()
    assert torch.equal(pipe(), stock)
    assert torch.equal(pipe(), stock)
    (message,) = said(log)
    assert reason in message
    assert message.startswith("Looped: guidance settings were not applied: ")


@pytest.mark.parametrize("guide", [masked, unguided])
def test_strict_raises_at_the_first_step_and_leaves_nothing_behind(guide):
    pipe = enable_guidance_rescale(looped(guide), strict=True)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(GuidanceError, match="Looped: guidance settings were not applied"):
        pipe()
    assert len(calls) == 1
    assert clean(pipe)


def test_a_pipeline_without_scheduler_steps_is_named(log):
    class NoLoop(Looped):
        def __call__(self, prompt=None, guidance_scale=7.5):
            return 0

    pipe = NoLoop(**tiny_stable_diffusion().components, requires_safety_checker=False)
    assert enable_guidance_rescale(pipe)() == 0
    assert "no scheduler.step call uses the denoiser output" in said(log)[0]
    with pytest.raises(GuidanceError, match=r"no scheduler\.step call uses the denoiser output"):
        enable_guidance_rescale(pipe, strict=True)()


def test_guidance_that_a_callback_switches_off_is_no_reason_to_complain(log):
    def off_after_two(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    how = {"callback_on_step_end": off_after_two, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    stock = generate(tiny_stable_diffusion(), guidance_rescale=0.7, **how)
    ours = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7, strict=True), **how)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert not said(log)


def test_interrupting_is_no_reason_to_complain(log):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    stock = generate(tiny_stable_diffusion(), guidance_rescale=0.7, callback_on_step_end=interrupt)
    ours = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.7), callback_on_step_end=interrupt)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert not said(log)


def test_equal_prompts_leave_nothing_to_rescale(log):
    """The two predictions are then equal, and so is the guided one."""
    how = {"negative_prompt": "a dark landscape"}
    stock, ours = tiny_stable_diffusion(), enable_guidance_rescale(tiny_stable_diffusion(), strict=True)
    assert torch.equal(generate(ours, **how), generate(stock, **how))
    assert not said(log)


def test_nothing_stays_after_a_call_or_an_exception():
    pipe = enable_guidance_rescale(tiny_stable_diffusion())
    expected = generate(pipe)
    assert clean(pipe)

    def explode(*args):
        assert not clean(pipe)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, callback_on_step_end=explode)
    assert clean(pipe)
    assert torch.equal(generate(pipe), expected)


def test_a_step_that_somebody_else_has_wrapped_stays_wrapped():
    pipe = enable_guidance_rescale(tiny_stable_diffusion())
    expected, seen, original = generate(pipe), [], pipe.scheduler.step

    def wrapped(output, *args, **kwargs):
        seen.append(output)
        return original(output, *args, **kwargs)

    pipe.scheduler.step = wrapped
    assert torch.equal(generate(pipe, eta=0.0), expected)
    assert len(seen) == 4
    assert vars(pipe.scheduler)["step"] is wrapped


def attributes_copied(self):
    vars(self.scheduler).update(copy.deepcopy(vars(self.scheduler)))


def scheduler_copied(self):
    self.originals.append(self.scheduler)
    self.scheduler = copy.deepcopy(self.scheduler)


@pytest.mark.full
@pytest.mark.parametrize("copied", [attributes_copied, scheduler_copied])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_that_is_copied_in_the_middle_still_steps(copied, scheduler):
    """Panorama copies its scheduler's attributes, Text2Video-Zero the scheduler, which may remember its last steps."""

    def copying(self, x, t, embeds, w):
        copied(self)
        return stacked(self, x, t, embeds, w)

    def build(guide):
        pipe = looped(guide)
        pipe.scheduler, pipe.originals = scheduler.from_config(zero_snr_scheduler().config), []
        return enable_guidance_rescale(pipe, strict=True)

    plain, pipe = build(stacked), build(copying)
    assert torch.equal(pipe(), plain())
    assert clean(pipe)
    assert all("step" not in vars(original) for original in pipe.originals)
    assert torch.equal(pipe(), plain())


def in_threads(*functions):
    results = [None] * len(functions)

    def run(i):
        torch.set_num_threads(1)  # as the main thread: each has a number of its own, and sums of more are other sums
        results[i] = functions[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.full
def test_pipelines_in_threads_that_share_a_network_do_not_see_each_other():
    """The rest is their own: a tokenizer that two threads share is not safe in stock either."""
    unet = tiny_stable_diffusion().unet

    def make(phi):
        pipe = tiny_stable_diffusion()
        pipe.unet, pipe.tokenizer = unet, copy.deepcopy(pipe.tokenizer)
        return pipe if phi is None else enable_guidance_rescale(pipe, phi, strict=True)

    phis = (None, 0.3, 0.7, 1.0)
    alone = [generate(make(phi), num_inference_steps=8) for phi in phis]
    for _ in range(3):
        pipes = [make(phi) for phi in phis]
        together = in_threads(*[lambda pipe=pipe: generate(pipe, num_inference_steps=8) for pipe in pipes])
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other)
        assert all(clean(pipe) for pipe in pipes)


@pytest.mark.parametrize("in_place", [True, False])
def test_runs_that_share_a_scheduler_and_a_network_share_their_patches(in_place):
    """Each thread takes its steps while the other's run is open; who comes first is the first to go."""
    base = tiny_stable_diffusion(ZeroSNRDDIMScheduler(prediction_type="v_prediction"))
    if in_place:  # what `unet.compile()` does, without the compilation
        base.unet._compiled_call_impl = base.unet._call_impl
    base.scheduler.set_timesteps(2)
    before = {**vars(base.scheduler)}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    both_open, first_gone = threading.Barrier(2), threading.Event()

    def step(phi, goes_first):
        pipe = StableDiffusionPipeline(**base.components, requires_safety_checker=False)
        with torch.no_grad(), GuidanceInterceptor(pipe, GuidanceSettings(phi, strict=True)):
            both_open.wait(10)
            if not goes_first:
                first_gone.wait(10)
            u, c = pipe.unet(torch.cat([x, x]), 999, encoder_hidden_states=embeds).sample.chunk(2)
            result = pipe.scheduler.step(u + 7.5 * (c - u), pipe.scheduler.timesteps[0], x).prev_sample
        first_gone.set()
        return result, rescale_guidance(u + 7.5 * (c - u), c, phi)

    for result, expected in in_threads(lambda: step(0.3, True), lambda: step(1.0, False)):
        scheduler = ZeroSNRDDIMScheduler.from_config(base.scheduler.config)
        scheduler.set_timesteps(2)
        assert torch.equal(result, scheduler.step(expected, 999, x).prev_sample)
    assert {**vars(base.scheduler)}.keys() == before.keys()
    assert not base.unet._forward_hooks
    if in_place:
        assert base.unet._compiled_call_impl == base.unet._call_impl


@pytest.mark.full
def test_a_pipeline_inside_another_one_s_call_is_its_own():
    inner = enable_guidance_rescale(tiny_stable_diffusion(), 1.0, strict=True)
    expected = generate(inner)
    inside = []

    def paint_inside(pipe, step, timestep, tensors):
        inside.append(generate(inner))
        return tensors

    outer = enable_guidance_rescale(tiny_stable_diffusion(), 0.4, strict=True)
    outer_expected = generate(outer)
    assert torch.equal(generate(outer, callback_on_step_end=paint_inside), outer_expected)
    assert all(torch.equal(image, expected) for image in inside)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_denoiser_is_neither_broken_nor_compiled_again(in_place):
    expected = generate(enable_guidance_rescale(tiny_stable_diffusion()))
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), strict=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if in_place:
        pipe.unet.compile(backend="eager", fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(generate(pipe), expected)
        generate(pipe, guidance_rescale=0.0)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_an_offloaded_denoiser():
    """accelerate's hooks, with the CPU in the place of an accelerator."""
    expected = generate(enable_guidance_rescale(tiny_stable_diffusion()))
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), strict=True)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.unet, "_hf_hook")
    for _ in range(2):
        torch.testing.assert_close(generate(pipe), expected)
    assert clean(pipe)


def test_a_scheduler_swapped_after_enabling():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), strict=True)
    pipe.scheduler = DDIMScheduler.from_config(zero_snr_scheduler().config, timestep_spacing="linspace")
    stock = tiny_stable_diffusion(DDIMScheduler.from_config(pipe.scheduler.config))
    torch.testing.assert_close(generate(pipe), generate(stock, guidance_rescale=0.7), rtol=1e-5, atol=1e-5)


def test_lora():
    def build():
        pipe = tiny_stable_diffusion()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        return pipe

    stock = generate(build(), guidance_rescale=0.7)
    assert not torch.allclose(stock, generate(tiny_stable_diffusion(), guidance_rescale=0.7), atol=1e-2)
    ours = generate(enable_guidance_rescale(build(), strict=True))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_ip_adapter():
    generator, embeds = torch.Generator().manual_seed(0), torch.randn(2, 1, 6)

    def normal(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    def weights(unet):
        width, keys = unet.config.cross_attention_dim, {}
        for place, name in enumerate(unet.attn_processors):
            if name.endswith("attn2.processor"):
                size = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
                keys |= {f"{place}.to_{kind}_ip.weight": normal(size, width) for kind in "kv"}
        projection = {"proj.weight": normal(4 * width, 6), "proj.bias": normal(4 * width)}
        projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        return {"image_proj": projection, "ip_adapter": keys}

    adapter = weights(tiny_stable_diffusion().unet)

    def build():
        pipe = tiny_stable_diffusion()
        pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
        return pipe

    stock = generate(build(), guidance_rescale=0.7, ip_adapter_image_embeds=[embeds])
    assert not torch.allclose(stock, generate(tiny_stable_diffusion(), guidance_rescale=0.7), atol=1e-2)
    ours = generate(enable_guidance_rescale(build(), strict=True), ip_adapter_image_embeds=[embeds])
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)

"""Low frequencies that guidance leaves to the conditional prediction, in pipelines and in a guider of diffusers."""

import functools
import inspect
import json

import diffusers
import diffusers.guiders as guiders
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from guidance_oracle import build, errors, recorded
from guidance_pipelines import CONDITIONAL, NOT_HERE, TRANSFORMERS, called
from guided_pipelines import generate, watched_calls
from hypothesis import given
from hypothesis import strategies as st
from published_models import in_memory
from small_pipelines import PIPELINES
from third_parties import FLOW_WARNINGS, PIPELINE_WARNINGS
from tiny_class_conditional import build as build_class_conditional
from tiny_class_conditional import generate_classes
from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl

import zsnr_diffusers
from zsnr_diffusers import (
    KeepLowFrequenciesGuidance,
    ZeroSNRStableDiffusionPipeline,
    disable_guidance_rescale,
    enable_guidance_rescale,
    keep_low_frequencies,
    load_pipeline,
)
from zsnr_diffusers.core import classifier_free_guidance, low_pass, rescale_guidance
from zsnr_diffusers.guidance.layout import find_denoisers
from zsnr_diffusers.guidance.record import guidance_record, recorded_guidance

pytestmark = [*PIPELINE_WARNINGS, *FLOW_WARNINGS]
K = 2

NO_HEIGHT_AND_WIDTH = (
    *("BriaPipeline", "BriaFiboPipeline", "BriaFiboEditPipeline"),
    *("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"),
    *("FluxKontextPipeline", "FluxKontextInpaintPipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    *("Ideogram4Pipeline", "Krea2Pipeline", "LongCatImagePipeline", "LongCatImageEditPipeline", "OvisImagePipeline"),
    *("LTXPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
    *("LTX2Pipeline", "LTX2ConditionPipeline", "LTX2InContextPipeline", "LTX2HDRPipeline", "SanaWMPipeline"),
    *(name for name in TRANSFORMERS if name.startswith("QwenImage")),
    *("NucleusMoEImagePipeline", "JoyImageEditPipeline", "JoyImageEditPlusPipeline", "Cosmos3OmniPipeline"),
    *("StableAudioPipeline", "StableAudio3Pipeline", "LongCatAudioDiTPipeline"),
)
"""Pipelines whose schedulers get packed tokens, rows of images or patches, or sound."""

SMALL = {name: small for name, small in {**PIPELINES, **TRANSFORMERS}.items() if name not in NOT_HERE}
ACTING = sorted({*SMALL} - {*NO_HEIGHT_AND_WIDTH})
REFUSED = sorted({*SMALL} & {*NO_HEIGHT_AND_WIDTH})


# In pipelines


@pytest.mark.parametrize(("name", "phi"), [(name, 0.0 if i % 10 == 0 else 0.7) for i, name in enumerate(ACTING)])
def test_the_scheduler_gets_the_guided_prediction_with_the_conditional_s_low_frequencies(name, phi):
    """Of every frame of a video; wherever the pipeline has the channels, and whatever its network predicts."""
    small = SMALL[name]
    pipe = enable_guidance_rescale(build(small), phi, keep_low_frequencies=K, strict=True)
    with recorded(pipe) as run:
        called(pipe, small)
    channels_last = name.startswith(("Kandinsky5", "Kandinsky6"))
    error, change = errors(small, run, phi, CONDITIONAL.get(name), K, channels_last)
    assert error < (1e-5 if name == "Cosmos2TextToImagePipeline" else 1e-6)  # see test_transformer_pipelines
    assert change > 4 * error


@pytest.mark.parametrize("name", REFUSED)
def test_predictions_without_height_and_width_are_refused_and_nothing_stays(name):
    small = SMALL[name]
    pipe = enable_guidance_rescale(build(small), 0.0, keep_low_frequencies=K)
    with pytest.raises(ValueError, match=r"keep_low_frequencies=2 needs predictions \[..., H, W\], but got \["):
        called(pipe, small)
    schedulers = [part for part in vars(pipe).values() if isinstance(part, diffusers.SchedulerMixin)]
    assert not any("step" in vars(scheduler) for scheduler in schedulers)
    assert not any(denoiser._forward_hooks for denoiser in find_denoisers(pipe))


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_what_reaches_the_scheduler(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    seen = watched_calls(enable_guidance_rescale(pipe, 0.7, keep_low_frequencies=3))
    generate(pipe)
    assert len(seen["scheduler"]) == 4
    for output, stepped in zip(seen["unet"], seen["scheduler"], strict=True):
        unconditional, conditional = output.chunk(2)
        guided = rescale_guidance(classifier_free_guidance(unconditional, conditional, 7.5), conditional, 0.7)
        torch.testing.assert_close(stepped, keep_low_frequencies(guided, conditional, 3), rtol=1e-6, atol=1e-6)
        # The rescale comes before, so that it changes no brightness.
        torch.testing.assert_close(stepped.mean((2, 3)), conditional.mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_at_zero_and_after_disabling_the_pipeline_is_stock_bit_for_bit(cls):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    stock, before = generate(pipe), set(vars(pipe))
    enable_guidance_rescale(pipe, 0.0, keep_low_frequencies=K)
    assert not torch.equal(generate(pipe), stock)
    assert torch.equal(generate(pipe, keep_low_frequencies=0), stock)
    assert torch.equal(generate(enable_guidance_rescale(pipe, 0.0)), stock)
    enable_guidance_rescale(pipe, 0.0, keep_low_frequencies=K)
    assert torch.equal(generate(disable_guidance_rescale(pipe)), stock)
    assert type(pipe) is cls
    assert set(vars(pipe)) == before


def test_from_the_side_of_the_latents_on_a_pipeline_is_not_guided_at_all():
    """Latents of 8 x 8: all frequencies are the conditional prediction's."""
    unguided = generate(tiny_stable_diffusion(), guidance_scale=1.0)
    for k in (8, 100):
        kept = generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=k))
        torch.testing.assert_close(kept, unguided, rtol=1e-4, atol=1e-4)  # in batches of other sizes


def test_every_space_of_the_rescale_is_followed_by_it():
    for space in ("v", "epsilon", "x_0"):
        seen = watched_calls(
            pipe := enable_guidance_rescale(tiny_stable_diffusion(), 0.7, space=space, keep_low_frequencies=K)
        )
        generate(pipe)
        for output, stepped in zip(seen["unet"], seen["scheduler"], strict=True):
            conditional = output.chunk(2)[1]
            torch.testing.assert_close(low_pass(stepped, K), low_pass(conditional, K), rtol=1e-4, atol=1e-5)


def test_pixels():
    pipe = build_class_conditional()
    stock = generate_classes(pipe)
    kept = generate_classes(pipe, keep_low_frequencies=K)
    assert torch.equal(generate_classes(enable_guidance_rescale(pipe, 0.0, keep_low_frequencies=K)), kept)
    assert torch.equal(generate_classes(pipe, keep_low_frequencies=0), stock)
    assert not torch.equal(kept, stock)


def test_half_precision():
    pipe = enable_guidance_rescale(tiny_stable_diffusion().to(torch.bfloat16), 0.7, keep_low_frequencies=K)
    latents = generate(pipe)
    assert latents.dtype == torch.bfloat16
    assert bool(latents.isfinite().all())


READY = [name for name in zsnr_diffusers.__all__ if name.startswith("ZeroSNR") and name.endswith("Pipeline")]
TEXT_TO_IMAGE = ("ZeroSNRStableDiffusionPipeline", "ZeroSNRStableDiffusionXLPipeline")


def test_a_ready_class_of_text_to_image_is_stock_s_with_both_off():
    stock = generate(tiny_stable_diffusion())
    ready = ZeroSNRStableDiffusionPipeline(**tiny_stable_diffusion().components, requires_safety_checker=False)
    assert not torch.equal(generate(ready), generate(ready, keep_low_frequencies=0))
    assert torch.equal(generate(ready, guidance_rescale=0.0, keep_low_frequencies=0), stock)
    assert torch.equal(generate(disable_guidance_rescale(ready)), stock)


def test_ready_classes_of_text_to_image_keep_4_by_default_and_the_others_none():
    for name in READY:
        assert getattr(zsnr_diffusers, name).default_keep_low_frequencies == (4 if name in TEXT_TO_IMAGE else 0)


# The ways to ask for it


def enabled(phi):
    return generate(enable_guidance_rescale(tiny_stable_diffusion(), phi, keep_low_frequencies=K))


def by_call(phi):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.3)
    return generate(pipe, guidance_rescale=phi, keep_low_frequencies=K)


def by_class(phi):
    pipe = ZeroSNRStableDiffusionPipeline(**tiny_stable_diffusion().components, requires_safety_checker=False)
    return generate(pipe, guidance_rescale=phi, keep_low_frequencies=K)


def by_guider(phi):
    guider = KeepLowFrequenciesGuidance(7.5, keep_low_frequencies=K, guidance_rescale=phi)
    return generate(enable_guidance_rescale(tiny_stable_diffusion(), guider=guider))


def beside_a_guider(phi):
    guider = guiders.ClassifierFreeGuidance(7.5)
    return generate(enable_guidance_rescale(tiny_stable_diffusion(), phi, guider=guider, keep_low_frequencies=K))


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_all_ways_lead_to_the_same_images(phi):
    expected = enabled(phi)
    for other in (by_call, by_class, by_guider, beside_a_guider):
        torch.testing.assert_close(other(phi), expected, rtol=1e-5, atol=1e-5)


def test_a_call_overrides_what_was_enabled():
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=K)
    before = generate(pipe)
    more = generate(pipe, keep_low_frequencies=4)
    assert torch.equal(more, generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=4)))
    assert torch.equal(generate(pipe), before)


def test_without_guidance_nothing_changes():
    stock = generate(tiny_stable_diffusion(), guidance_scale=1.0)
    assert torch.equal(
        generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=K), guidance_scale=1.0),
        stock,
    )


@pytest.mark.parametrize("k", [-1, 2.5, True, "2"])
def test_what_is_no_count_is_refused_before_anything_runs(k, tmp_path):
    match = rf"keep_low_frequencies={k!r} must be an integer"
    pipe = tiny_stable_diffusion()
    with pytest.raises(ValueError, match=match):
        enable_guidance_rescale(pipe, keep_low_frequencies=k)
    assert type(pipe) is StableDiffusionPipeline
    seen = watched_calls(enable_guidance_rescale(pipe, 0.0))
    with pytest.raises(ValueError, match=match):
        generate(pipe, keep_low_frequencies=k)
    assert not seen["unet"]
    with pytest.raises(ValueError, match=match):
        KeepLowFrequenciesGuidance(keep_low_frequencies=k)
    for load in (load_pipeline, ZeroSNRStableDiffusionPipeline.from_pretrained):
        with pytest.raises(ValueError, match=match):  # before anything is looked for
            load(tmp_path / "nowhere", keep_low_frequencies=k)


def test_integers_of_numpy_are_saved_as_integers(tmp_path):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=np.int64(K))
    assert json.loads(pipe.to_json_string())["_guidance_keep_low_frequencies"] == K


# The guider


def test_the_guider_by_hand():
    guider = KeepLowFrequenciesGuidance(5.0, keep_low_frequencies=3, guidance_rescale=0.7)
    u, c = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = keep_low_frequencies(rescale_guidance(u + 5 * (c - u), c, 0.7), c, 3)
    torch.testing.assert_close(guider.forward(c, u)[0], expected)
    original = KeepLowFrequenciesGuidance(4.0, 3, 0.7, use_original_formulation=True)
    torch.testing.assert_close(original.forward(c, u)[0], expected)
    for off in (KeepLowFrequenciesGuidance(1.0), KeepLowFrequenciesGuidance(5.0, enabled=False)):
        assert off.num_conditions == 1
        assert torch.equal(off.forward(c)[0], c)


def test_at_zero_the_guider_is_stock_s():
    u, c = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, stock = KeepLowFrequenciesGuidance(5.0, 0), guiders.ClassifierFreeGuidance(5.0)
    assert torch.equal(ours.forward(c, u)[0], stock.forward(c, u)[0])


def test_the_guider_guides_in_an_interval():
    pipe = enable_guidance_rescale(
        tiny_stable_diffusion(), guider=KeepLowFrequenciesGuidance(7.5, K, start=0.25, stop=0.75)
    )
    seen = watched_calls(pipe)
    generate(pipe, num_inference_steps=8)
    conditional = [torch.equal(g, o.chunk(2)[1]) for g, o in zip(seen["scheduler"], seen["unet"], strict=True)]
    assert conditional == [True, True, False, False, False, False, True, True]


def test_the_guider_s_config_is_saved_whole(tmp_path):
    """A base class that registers its own arguments after ours would have them read back as its defaults."""
    values = {
        **{"guidance_scale": 5.0, "keep_low_frequencies": 3, "guidance_rescale": 0.4},
        **{"use_original_formulation": True, "start": 0.1, "stop": 0.8, "enabled": False},
    }
    guider = KeepLowFrequenciesGuidance(**values)
    guider.save_pretrained(tmp_path)
    for other in (
        guider,
        KeepLowFrequenciesGuidance.from_config(guider.config),
        KeepLowFrequenciesGuidance.from_pretrained(tmp_path),
    ):
        assert {name: other.config[name] for name in values} == values
        assert (other.guidance_scale, other.keep_low_frequencies, other.guidance_rescale) == (5.0, 3, 0.4)
        assert other.num_conditions == 1
    assert {*inspect.signature(KeepLowFrequenciesGuidance).parameters} == {*values}


def test_what_the_guider_does_and_the_pipeline_too_is_refused():
    guider = KeepLowFrequenciesGuidance(keep_low_frequencies=3, guidance_rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0.5 and the pipeline 0.7"):
        enable_guidance_rescale(tiny_stable_diffusion(), 0.7, guider=guider)
    with pytest.raises(ValueError, match=r"keep_low_frequencies=3 and the pipeline 2, .* set one of them to 0"):
        enable_guidance_rescale(tiny_stable_diffusion(), guider=guider, keep_low_frequencies=K)
    with pytest.raises(ValueError, match="and the pipeline 2"):
        generate(enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=K), guider=guider)


@pytest.mark.skipif("HunyuanImagePipeline" not in TRANSFORMERS, reason="not in older diffusers")
def test_a_pipeline_with_a_guider_among_its_components_takes_it():
    small = TRANSFORMERS["HunyuanImagePipeline"]
    theirs, ours = build(small), build(small)
    ours.guider = KeepLowFrequenciesGuidance(3.0, K)
    theirs.guider = guiders.ClassifierFreeGuidance(3.0)
    stock = called(theirs, small)
    enable_guidance_rescale(theirs, 0.0, keep_low_frequencies=K, strict=True)
    kept = called(ours, small)
    torch.testing.assert_close(kept, called(theirs, small), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kept, stock, rtol=1e-3, atol=1e-3)


def test_the_guider_refuses_tokens_with_what_to_do():
    c, u = torch.randn(2, 1, 16, 64)
    with pytest.raises(ValueError, match=r"keep_low_frequencies=4 needs .* got \[1, 16, 64\].*unpack"):
        KeepLowFrequenciesGuidance().forward(c, u)


MODULAR_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@functools.cache
def modular_blocks():
    return diffusers.modular_pipelines.StableDiffusionXLAutoBlocks()


@pytest.mark.skipif(
    not hasattr(guiders.guider_utils, "GuiderOutput"), reason="older modular pipelines load components by themselves"
)
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_a_modular_pipeline_takes_the_guider(phi):
    pipe = tiny_stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a dark landscape", "num_inference_steps": 2, "height": 64, "width": 64}
    modular = modular_blocks().init_pipeline()
    modular.update_components(
        **{name: pipe.components[name] for name in MODULAR_PARTS},
        guider=KeepLowFrequenciesGuidance(7.5, keep_low_frequencies=K, guidance_rescale=phi),
    )
    modular.set_progress_bar_config(disable=True)
    found = modular(**call, generator=torch.Generator().manual_seed(0), output="latents")
    enable_guidance_rescale(pipe, phi, keep_low_frequencies=K)
    call |= {"generator": torch.Generator().manual_seed(0), "guidance_scale": 7.5, "output_type": "latent"}
    # Called once for both predictions, or twice
    torch.testing.assert_close(found, pipe(**call).images, rtol=1e-4, atol=1e-4)


# What is saved


@given(phi=st.floats(0, 1), k=st.integers(0, 9), space=st.sampled_from(["output", "v", "x_0"]))
def test_what_is_recorded_is_read_back(phi, k, space):
    record = guidance_record(phi, space, k)
    assert all(name.startswith("_") for name in record)  # which stock loaders ignore
    read = recorded_guidance(json.loads(json.dumps(record)))
    assert bool(read) == bool(phi or k)
    expected = {"guidance_rescale": phi, "space": space if phi else "output", "keep_low_frequencies": k}
    assert read in ({}, expected)
    # as earlier versions wrote it
    record.pop("_guidance_keep_low_frequencies", None)
    assert recorded_guidance(record).get("keep_low_frequencies", 0) == 0


@pytest.mark.full
def test_k_travels_with_the_pipeline(tmp_path, log):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=K)
    expected, stock = generate(pipe), generate(tiny_stable_diffusion())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_guidance_keep_low_frequencies"] == K
    more = generate(pipe, keep_low_frequencies=4)
    for load in (load_pipeline, ZeroSNRStableDiffusionPipeline.from_pretrained):
        assert torch.equal(generate(in_memory(load(tmp_path))), expected)
        assert torch.equal(generate(in_memory(load(tmp_path, keep_low_frequencies=4))), more)
        assert torch.equal(generate(in_memory(load(tmp_path, keep_low_frequencies=0))), stock)
    log.clear()
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    assert not [record for record in log.records if "guidance" in record.getMessage()]
    assert torch.equal(generate(in_memory(opened)), stock)


@pytest.mark.full
def test_what_is_given_to_a_loader_leaves_the_rest_as_it_is(tmp_path):
    assert ZeroSNRStableDiffusionPipeline.default_keep_low_frequencies == 4
    tiny_stable_diffusion().save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, keep_low_frequencies=K)
    assert (loaded.default_guidance_rescale, loaded.default_keep_low_frequencies) == (0.0, K)
    ready = ZeroSNRStableDiffusionPipeline.from_pretrained(tmp_path, keep_low_frequencies=K)
    assert (ready.default_guidance_rescale, ready.default_keep_low_frequencies) == (0.7, K)
    enable_guidance_rescale(tiny_stable_diffusion(), 0.4, keep_low_frequencies=K).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, guidance_rescale=0.9)
    assert (loaded.default_guidance_rescale, loaded.default_keep_low_frequencies) == (0.9, K)


@pytest.mark.parametrize("value", [-1, 2.0, "2", None, True])
def test_what_is_recorded_and_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=f"keep_low_frequencies={value!r} must be an integer"):
        recorded_guidance({"_guidance_keep_low_frequencies": value})


def test_loaders_refuse_it_with_the_name_of_the_folder(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_guidance_keep_low_frequencies": 2.5}))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*keep_low_frequencies=2.5 must be"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"keep_low_frequencies=2.5 must be"):
        ZeroSNRStableDiffusionPipeline.from_pretrained(tmp_path)

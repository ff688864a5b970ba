import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from published_models import networks
from starts import MODELS, features_of, fitted, photos, quiet, with_colors_as_latents

from zsnr_diffusers.start import StartReport, fit_start, hand_set_start
from zsnr_diffusers.start import fit as module
from zsnr_diffusers.start.data import MemoryCache
from zsnr_diffusers.start.encoding import encode_images, pixel_values
from zsnr_diffusers.utils.hashing import state_sha256
from zsnr_diffusers.utils.images import load_rgb


@pytest.mark.parametrize("name", MODELS)
def test_it_predicts_an_image_s_brightness_from_its_caption(name):
    """Through the base's own tokenizers and text encoders; latents are colors here, so what is right is known."""
    pipe, start = quiet(name), fitted(name)
    images, captions = photos()
    means = start.law.mean(features_of(pipe, captions)).detach()
    colors = pixel_values([load_rgb(image) for image in images]).mean(dim=(2, 3))
    error = (means[:, :3, 0, 0] - colors).square().sum() / (colors - colors.mean(dim=0)).square().sum()
    assert 0.01 < float(error) < 0.1  # six captions for a continuous range
    assert start.report["explained"][0][0] == pytest.approx(1 - float(error), abs=0.05)
    covariance = torch.cov((colors - means[:, :3, 0, 0]).mT)
    first = [channel * start.law.frequencies**2 for channel in range(3)]
    torch.testing.assert_close(start.law.covariance[first][:, first], covariance, rtol=0.5, atol=1e-3)  # held out


@pytest.mark.parametrize("name", MODELS)
def test_latents_are_those_of_the_pipeline_s_own_autoencoder(name):
    pipe = quiet(name)
    pixels = pixel_values([load_rgb(photos()[0][0])])
    with torch.no_grad():
        by_hand = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encode_images(pipe.vae, pixels), by_hand)
    start = fit_start(pipe, *photos(), progress=False)
    assert start.law.channels == 4
    assert start.law.num_features == features_of(pipe, ["a"]).shape[1]
    latents = torch.cat([encode_images(pipe.vae, pixel_values([load_rgb(image)])) for image in photos()[0]])
    low, high = start.law.bounds[:, :, 0, 0]
    means = latents.mean(dim=(2, 3))
    torch.testing.assert_close(low, means.amin(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(high, means.amax(dim=0), rtol=0, atol=1e-5)


def test_the_base_is_not_changed():
    pipe = quiet("xl")
    before = {name: state_sha256(network) for name, network in networks(pipe).items()}
    fit_start(pipe, *photos(), progress=False)
    assert {name: state_sha256(network) for name, network in networks(pipe).items()} == before


def test_the_report_says_what_holds_for_images_held_out():
    report = StartReport.of(fitted("1.5").report)
    text = str(report)
    assert text.startswith(
        "40 images, 6 captions; cross-validation: 5 folds of the images (too few captions to hold some out)"
    )
    assert f"Captions explain {report.explained[0][0]:.0%} of the variance of brightness and color" in text
    assert json.loads(json.dumps(report.to_dict())) == fitted("1.5").report


def test_captions_that_say_nothing_are_said_to_say_nothing():
    images, captions = photos()
    shuffled = [captions[i] for i in torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    start = fit_start(with_colors_as_latents(quiet("1.5")), images, shuffled, progress=False)
    assert start.report["explained"][0][0] == 0
    assert "Captions do not predict the brightness and color of held-out images" in str(StartReport.of(start.report))
    assert float(start.law.weight.abs().max()) < 0.1 * float(fitted("1.5").law.weight.abs().max())


def test_without_captions_it_is_the_same_for_every_prompt():
    start = fit_start(with_colors_as_latents(quiet("1.5")), photos()[0], None, progress=False)
    assert start.law.num_features == 0
    torch.testing.assert_close(
        start.law.bias[:, 0, 0],
        fitted("1.5").law.mean(features_of(quiet("1.5"), photos()[1]))[..., 0, 0].mean(0),
        rtol=0,
        atol=0.05,
    )
    assert "The start ignores prompts" in str(StartReport.of(start.report))


def test_several_captions_of_an_image_are_averaged():
    images, captions = photos()
    pairs = [(caption, caption) for caption in captions]
    start = fit_start(with_colors_as_latents(quiet("1.5")), images, pairs, progress=False)
    torch.testing.assert_close(start.law.weight, fitted("1.5").law.weight)


def test_what_is_kept_is_not_computed_again():
    caches = {}

    def open_cache(name, facts):
        return caches.setdefault((name, json.dumps(facts, sort_keys=True)), MemoryCache(name, facts))

    pipe = quiet("1.5")
    first = fit_start(pipe, *photos(), open_cache=open_cache, progress=False)
    pipe.vae.encode = pipe.encode_prompt = None
    again = fit_start(pipe, *photos(), open_cache=open_cache, progress=False)
    assert torch.equal(first.law.weight, again.law.weight)
    assert len(caches) == 2
    with pytest.raises(TypeError, match="not callable"):  # at another resolution, latents are others
        fit_start(pipe, *photos(), open_cache=open_cache, resolution=32, progress=False)


def test_images_are_what_they_are_in_every_form(tmp_path):
    images, captions = photos()
    others = [load_rgb(images[0]), images[1].read_bytes(), str(images[2]), *images[3:]]
    start = fit_start(with_colors_as_latents(quiet("1.5")), others, captions, progress=False)
    torch.testing.assert_close(start.law.bias, fitted("1.5").law.bias)


def test_what_cannot_be_fitted_is_refused_before_anything_is_computed():
    pipe = quiet("1.5")
    pipe.vae.encode = pipe.encode_prompt = None
    images, captions = photos()
    with pytest.raises(
        ValueError, match=r"12 images are too few to fit and hold out: use at least 24, better hundreds"
    ):
        fit_start(pipe, images[:12], captions[:12])
    with pytest.raises(ValueError, match="There are 40 images and 39 captions"):
        fit_start(pipe, images, captions[:39])
    with pytest.raises(ValueError, match="All 40 captions are 'a hill', so nothing can be learned from them"):
        fit_start(pipe, images, ["a hill"] * 40)
    with pytest.raises(ValueError, match="resolution=30 must be a multiple of 8"):
        fit_start(pipe, images, captions, resolution=30)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="ends in pure noise: its model needs no start"):
        fit_start(pipe, images, captions)


def test_latents_that_are_not_finite_are_named(monkeypatch):
    pipe = quiet("1.5")
    encode = module.__dict__["amplitudes_of_images"].__globals__["encode_images"]

    def broken(vae, pixels):
        latents = encode(vae, pixels)
        latents[3] = float("nan")
        return latents

    monkeypatch.setitem(module.amplitudes_of_images.__globals__, "encode_images", broken)
    with pytest.raises(ValueError, match=r"not finite for image 3 \(.*00003.png\): load the model in float32"):
        fit_start(pipe, *photos(), progress=False)


def test_an_autoencoder_that_overflows_in_float16_computes_in_float32():
    pipe = quiet("xl")
    pipe.vae.register_to_config(force_upcast=True)
    flat = pixel_values([Image.new("RGB", (64, 64), (200, 100, 0))])
    expected = encode_images(pipe.vae, flat)
    pipe.vae.half()
    torch.testing.assert_close(encode_images(pipe.vae, flat), expected, rtol=0, atol=2e-2)  # weights were rounded
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("name", MODELS)
def test_a_brightness_and_a_color_are_those_of_a_flat_image(name):
    pipe = quiet(name)
    start = hand_set_start(pipe, brightness=-0.8)
    assert start.law.bias.shape == (pipe.vae.config.latent_channels, 1, 1)
    assert start.law.num_features == 0
    assert float(start.law.covariance.abs().max()) == 0
    flat = Image.new("RGB", (128, 128), (25, 25, 25))  # -0.8 in [0, 255], rounded to even
    latents = encode_images(pipe.vae, pixel_values([flat]))
    torch.testing.assert_close(start.law.bias.flatten(), latents.mean(dim=(0, 2, 3)), rtol=0, atol=1e-6)
    gray = hand_set_start(pipe, color=(0.1, 0.1, 0.1))
    torch.testing.assert_close(gray.law.bias, start.law.bias, rtol=0, atol=1e-2)


def test_an_image_of_few_pixels_has_as_many_frequencies(tmp_path):
    pipe = quiet("1.5")
    small = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
    assert hand_set_start(pipe, image=small).law.frequencies == 4
    assert hand_set_start(pipe, image=photos()[0][0]).law.frequencies == 8
    small.save(tmp_path / "small.png")
    torch.testing.assert_close(
        hand_set_start(pipe, image=tmp_path / "small.png").law.bias, hand_set_start(pipe, image=small).law.bias
    )


def test_what_is_set_by_hand_is_checked():
    pipe = quiet("1.5")
    with pytest.raises(ValueError, match="Pass exactly one of brightness, color and image"):
        hand_set_start(pipe)
    with pytest.raises(ValueError, match="Pass exactly one of"):
        hand_set_start(pipe, brightness=0.0, color=(0, 0, 0))
    with pytest.raises(ValueError, match=r"brightness=-1.5 must lie in \[-1, 1\]"):
        hand_set_start(pipe, brightness=-1.5)
    with pytest.raises(ValueError, match=r"color=\(255, 0, 0\) must be red, green and blue, each in \[0, 1\]"):
        hand_set_start(pipe, color=(255, 0, 0))

"""Stable Diffusion XL, against what stock's own pipeline makes of the same captions and images."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from published_models import RESOLUTION, published_pipeline
from torch.utils.data import default_collate
from training_runs import logged, output_of, same, trained

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRStableDiffusionXLPipeline,
    audit,
    enforce_zero_terminal_snr,
    load_pipeline,
)
from zsnr_diffusers.hub.weight_files import DTYPE_ARGUMENT
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.training.stable_diffusion.base import load_base
from zsnr_diffusers.training.stable_diffusion.encoders import Autoencoder

CAPTIONS = ["a cat", "a dark landscape", "a black landscape " * 20, "ünknown ☃", "a", "snow snow"]


def task_of(options, **changes):
    return StableDiffusionTask(TrainingConfig(**{**options, **changes}))


def base_with(xl_folder, path, **changes):
    """A copy of the base whose model_index.json says something else."""
    shutil.copytree(xl_folder, path)
    file = path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(path)


def in_float32(folder):
    """Stock's pipeline; by the published config its text encoders would compute in half precision."""
    return StableDiffusionXLPipeline.from_pretrained(folder, **{DTYPE_ARGUMENT: torch.float32})


# -- the caption


@pytest.mark.parametrize("zeros", [True, False])
def test_text_is_that_of_the_stock_pipeline(xl_options, xl_folder, tmp_path, zeros):
    """Of captions what it makes of prompts; of no caption what it guides away from where nobody passes anything."""
    base = base_with(xl_folder, tmp_path / "base", force_zeros_for_empty_prompt=zeros)
    task = task_of(xl_options, pretrained_model_name_or_path=base)
    stock = in_float32(base)
    text, negative, pooled, negative_pooled = stock.encode_prompt(CAPTIONS, device="cpu")
    found = task.text_encoder(task.base.architecture.conditioning.tokenize([*CAPTIONS, ""]))
    # in batches of other sizes kernels round otherwise
    torch.testing.assert_close(found["text"][:-1], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled"][:-1], pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["text"][-1], negative[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled"][-1], negative_pooled[0], rtol=0, atol=1e-6)
    assert bool((found["text"][-1] == 0).all()) == zeros
    assert bool((text[0] != text[1]).any())
    ids = task.base.architecture.conditioning.tokenize(["a cat"])[0]
    assert not torch.equal(ids[:77], ids[77:])  # the tokenizers pad differently


# -- a step


def by_hand(options, folder, positions):
    """The loss of each position and the corner of its crop, from the files, by stock's pipeline and Pillow.

    The draws are those of the samples.
    """
    config = TrainingConfig(**options)
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config, progress=False))
    stock = in_float32(options["pretrained_model_name_or_path"])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    alpha_bar = enforce_zero_terminal_snr(stock.scheduler.alphas_cumprod)
    for position in positions:
        sample, row = samples[position], samples.row_at(position)
        dropped, flipped, _ = torch.rand(3, generator=make_generator(config.seed, 1, position)).tolist()
        image = ImageOps.exif_transpose(Image.open(folder / f"{row}.png")).convert("RGB")
        original = (image.height, image.width)
        scale = RESOLUTION / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
        if config.random_flip and flipped < 0.5:
            image, left = ImageOps.mirror(image), image.width - RESOLUTION - left
        shown = np.asarray(image.crop((left, top, left + RESOLUTION, top + RESOLUTION)))
        pixels = torch.tensor(shown).permute(2, 0, 1)[None]
        text, nothing, pooled, pooled_nothing = stock.encode_prompt(lines[row]["text"], device="cpu")
        if dropped < config.caption_dropout or not lines[row]["text"]:
            text, pooled = nothing, pooled_nothing
        time_ids = stock._get_add_time_ids(
            original, (top, left), (RESOLUTION, RESOLUTION), dtype=torch.float32, text_encoder_projection_dim=48
        )
        with torch.no_grad():
            posterior = stock.vae.encode(pixels / 127.5 - 1).latent_dist
            x_0 = (posterior.mean + posterior.std * sample["posterior_noise"]) * stock.vae.config.scaling_factor
            t, noise = sample["timestep"], sample["noise"]
            alpha, sigma = alpha_bar[t].sqrt().float(), (1 - alpha_bar[t]).sqrt().float()
            added = {"text_embeds": pooled, "time_ids": time_ids}
            output = stock.unet(alpha * x_0 + sigma * noise, t, text, added_cond_kwargs=added).sample
        yield (output - (alpha * noise - sigma * x_0)).square().mean().item(), (top, left)


@pytest.mark.full
@pytest.mark.parametrize("cache", ["none", "both"])
def test_the_loss_of_a_step_is_that_made_by_hand(xl_options, shapes_folder, cache):
    """And so caches on and off are the same; float32 keeps seven digits."""
    xl_options |= {"report_to": "tensorboard", "max_train_steps": 1, "train_batch_size": 8, "cache": cache}
    xl_options |= {"random_flip": True, "caption_dropout": 0.4}
    trained(TrainingConfig(**xl_options))
    losses, corners = zip(*by_hand(xl_options, shapes_folder, range(8)), strict=True)
    ((_, loss),) = logged(xl_options["output_dir"])["loss"]
    assert loss == pytest.approx(sum(losses) / 8, rel=1e-5)  # one batch, where by hand it was one by one
    assert len(set(corners)) > 3


def test_what_is_told_of_size_and_crop_is_used(xl_options):
    """A UNet that was told something else would predict something else."""
    task = task_of(xl_options)
    samples = task.samples(check_images(task.rows, task.config, progress=False))
    batch = default_collate([samples[0], samples[1]])
    x_t = torch.ones(2, 4, 8, 8)
    with torch.no_grad():
        told = task.predict(task.unet, x_t, task.encode(batch))
        for name in ("time_ids", "input_ids"):
            changed = {**batch, name: batch[name].flip(0)}
            assert (task.predict(task.unet, x_t, task.encode(changed)) - told).abs().max() > 1e-5


# -- a run

STOCK_ALONE = """
import sys
sys.modules["zsnr_diffusers"] = None  # importing it raises, as if it were not installed
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe).__name__ == "StableDiffusionXLPipeline", type(pipe)
assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.config.force_zeros_for_empty_prompt is False
generator = torch.Generator().manual_seed(0)
images = pipe("a dark landscape", num_inference_steps=4, generator=generator, output_type="pt", guidance_rescale=0.7)
torch.save(images.images, sys.argv[2])
"""


@pytest.mark.full
def test_the_result_is_a_stock_pipeline_and_previews_show_what_it_paints(xl_options, xl_folder, tmp_path, monkeypatch):
    seen, call = [], ZeroSNRStableDiffusionXLPipeline.__call__

    def spy(self, *args, **kwargs):
        seen.append(self.config.force_zeros_for_empty_prompt)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ZeroSNRStableDiffusionXLPipeline, "__call__", spy)
    base = base_with(xl_folder, tmp_path / "base", force_zeros_for_empty_prompt=False)
    xl_options |= {"pretrained_model_name_or_path": base, "validation_prompts": ["snow"], "max_train_steps": 2}
    train(TrainingConfig(**xl_options))
    folder = Path(xl_options["output_dir"])
    assert seen == [False]
    assert (folder / "previews" / "step-000002.png").is_file()
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for file in (path for path in (xl_folder / part).rglob("*") if path.is_file()):
            copied = (folder / file.relative_to(xl_folder)).read_bytes()
            # SDXL's text configs ask for float16, which is not what its files hold
            assert copied == file.read_bytes().replace(b'"torch_dtype": "float16"', b'"torch_dtype": "float32"')
    result = subprocess.run(
        [sys.executable, "-c", STOCK_ALONE, folder, tmp_path / "images.pt"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert load_pipeline(folder).default_keep_low_frequencies == 4
    pipe = load_pipeline(folder, keep_low_frequencies=0)  # which stock does not have
    assert pipe.default_guidance_rescale == 0.7
    pipe.scheduler = ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config)
    generated = pipe(
        "a dark landscape", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    # stock stands in for SNR 0 with 2^-24, so 2^-12 of the amplitude; this is half a grey level
    torch.testing.assert_close(generated, torch.load(tmp_path / "images.pt"), rtol=0, atol=0.5 / 255)
    assert audit(folder).verdict == "OK"
    assert "stable-diffusion-xl" in (folder / "README.md").read_text()
    source = (folder / "pipeline.py").read_text()
    assert "default_guidance_rescale = 0.7\n    default_keep_low_frequencies = 4\n" in source


@pytest.mark.slow  # the same is shown of the loop itself
def test_resumed_is_bitwise_the_uninterrupted_run_in_buckets_too(xl_options, tmp_path):
    xl_options |= {"aspect_ratio_buckets": True, "random_flip": True, "train_batch_size": 3, "max_train_steps": 7}
    whole = trained(TrainingConfig(**xl_options))
    parts = {**xl_options, "output_dir": str(tmp_path / "parts")}
    trained(TrainingConfig(**{**parts, "max_train_steps": 3}))
    assert same(trained(TrainingConfig(**{**parts, "resume": True})), whole)


@pytest.mark.full
@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_variants_run_and_stay_finite(xl_options, changes):
    weights = trained(TrainingConfig(**{**xl_options, **changes, "validation_prompts": ["snow"]}))
    assert all(bool(values.isfinite().all()) and values.dtype == torch.float32 for values in weights.values())


# -- the autoencoder's precision


@pytest.mark.parametrize("asked", [True, False])
def test_an_autoencoder_that_overflows_in_float16_computes_in_float32(asked):
    vae = published_pipeline("xl").vae
    vae.register_to_config(force_upcast=asked)
    for heeds in (True, False):
        part = Autoencoder(vae, heeds)
        assert part.arithmetic_dtype(torch.float16) == (torch.float32 if asked and heeds else torch.float16)
        assert part.arithmetic_dtype(torch.bfloat16) == torch.bfloat16
        assert part.arithmetic_dtype(None) is None


@pytest.mark.full
@pytest.mark.parametrize("asked", [True, False])
def test_previews_decode_in_that_precision_too(xl_options, monkeypatch, asked):
    task = task_of(xl_options, validation_prompts=["snow"], num_inference_steps=1)
    task.autoencoder.needs_float32, output = asked, output_of(task)
    seen, decode = [], AutoencoderKL.decode

    def spy(self, latents, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return decode(self, latents, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", spy)
    for half in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", half):
            output.validation_images(output.pipeline(task.unet))
    assert seen == [not asked, True]


# -- what is refused


def with_unet(xl_folder, path, **changes):
    shutil.copytree(xl_folder, path)
    config = UNet2DConditionModel.load_config(path / "unet")
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(path / "unet")
    return str(path)


@pytest.mark.full
def test_variants_of_sdxl_are_refused_with_the_reason(xl_options, xl_folder, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            load_base(TrainingConfig(**{**xl_options, "pretrained_model_name_or_path": path}), "v_prediction", True)

    nothing = {"text_encoder": [None, None], "tokenizer": [None, None]}
    refused(base_with(xl_folder, tmp_path / "refiner", **nothing), "the refiner of SDXL.*only text-to")
    refused(with_unet(xl_folder, tmp_path / "inpaint", in_channels=9), "takes 9 channels for 4 of latents")
    refused(with_unet(xl_folder, tmp_path / "lcm", time_cond_proj_dim=8), "takes the guidance scale.*distilled")
    five = with_unet(xl_folder, tmp_path / "five", projection_class_embeddings_input_dim=48 + 5 * 8)
    refused(five, "not conditioned like SDXL's on the caption and six numbers.*=88; expected 'text_time' and 96")
    shutil.copytree(xl_folder, tmp_path / "scaled")
    vae = AutoencoderKL.from_pretrained(tmp_path / "scaled" / "vae")
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "scaled" / "vae")
    refused(str(tmp_path / "scaled"), "scaled per channel")


def test_every_network_tells_a_run_s_base(xl_options):
    assert set(task_of(xl_options).initial_networks()) == {"unet", "vae", "text_encoder", "text_encoder_2"}

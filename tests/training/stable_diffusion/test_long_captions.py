"""Captions of more than 75 tokens, and clip skip: the states that pipelines and other programs compute."""

import itertools

import pytest
import torch
from training_runs import same, trained

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

LONG = " ".join(itertools.islice(itertools.cycle(["a", "cat", "in", "the", "snow"]), 100))
TEXTS = ["", "a cat", LONG, "snow " * 75, "snow " * 76, "snow " * 400]


@pytest.fixture(params=["sd", "xl"])
def model(request, options, xl_options):
    return options if request.param == "sd" else xl_options


def encoder(model, **changes):
    task = StableDiffusionTask(TrainingConfig(**{**model, **changes}))
    return task, task.base.architecture.conditioning, task.text_encoder


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_states_are_the_pipelines_with_clip_skip(model, clip_skip):
    task, conditioning, encode = encoder(model, clip_skip=clip_skip)
    found = encode(conditioning.tokenize(TEXTS[1:4]))
    given = task.base.pipeline.encode_prompt(
        TEXTS[1:4], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    # The pipeline encodes with dropout modules and dtypes of its own, and the same kernels.
    assert torch.allclose(found["text"], given[0], atol=1e-5)
    if "pooled" in found:
        assert torch.allclose(found["pooled"], given[2], atol=1e-5)
    assert encode.facts == {}
    assert ("clip_skip" in encode.cache_facts(None)["config"]) == (clip_skip is not None)


@pytest.mark.parametrize("tokens", [150, 225])
def test_each_75_tokens_are_encoded_as_a_caption_of_their_own(model, tokens):
    task, conditioning, encode = encoder(model, max_token_length=tokens)
    pipe, chunks = task.base.pipeline, tokens // 75
    tokenizers = [one for one in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if one]
    ids = conditioning.tokenize(TEXTS)
    assert ids.shape == (len(TEXTS), len(tokenizers) * 77 * chunks)
    states = encode(ids)
    _, alone, encode_alone = encoder(model)
    assert states["text"].shape[1] == 77 * chunks
    for row, text in enumerate(TEXTS):
        words = pipe.tokenizer(text, add_special_tokens=False, max_length=tokens, truncation=True).input_ids
        for number in range(chunks):
            part = pipe.tokenizer.decode(words[75 * number : 75 * (number + 1)])
            expected = encode_alone(alone.tokenize([part]))
            if part == "" and encode_alone.name == "text" and getattr(encode_alone, "empty", None) is not None:
                continue  # zeros stand for an empty caption as a whole, and there alone
            chunk = slice(77 * number, 77 * (number + 1))
            assert torch.allclose(states["text"][row, chunk], expected["text"][0], atol=1e-5)
            if number == 0 and "pooled" in states:
                assert torch.allclose(states["pooled"][row], expected["pooled"][0], atol=1e-5)
    if getattr(encode, "empty", None) is not None:
        assert not states["text"][0].any()


def test_short_captions_are_tokenized_as_before(model):
    _, conditioning, _ = encoder(model)
    _, longer, _ = encoder(model, max_token_length=150)
    for own, other in zip(
        conditioning.tokenize(TEXTS[:2]).chunk(len(conditioning.tokenizers), dim=1),
        longer.tokenize(TEXTS[:2]).chunk(len(conditioning.tokenizers), dim=1),
        strict=True,
    ):
        assert torch.equal(own, other[:, :77])


@pytest.mark.full
def test_a_run_with_long_captions_is_the_same_with_caches_and_without(options, tmp_path, image_folder):
    options |= {"max_token_length": 150, "clip_skip": 1, "validation_prompts": [LONG[:60]], "validation_steps": 4}
    online = trained(TrainingConfig(**{**options, "cache": "none", "output_dir": str(tmp_path / "online")}))
    cached = trained(TrainingConfig(**{**options, "cache": "both"}))
    assert all((online[name] - value).abs().max() < 1e-5 for name, value in cached.items())
    assert same(trained(TrainingConfig(**{**options, "cache": "both", "output_dir": str(tmp_path / "again")})), cached)


def test_samples_have_them(options):
    task = StableDiffusionTask(TrainingConfig(**{**options, "max_token_length": 225}))
    samples = task.samples(check_images(task.rows, task.config, False))
    assert samples[0]["input_ids"].shape == (3 * 77,)

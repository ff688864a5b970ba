import pytest
import torch
from diffusers import DiffusionPipeline
from landscapes import captions, make_landscapes, read_landscapes
from small_stable_diffusion import build_stable_diffusion, build_tokenizer, train_vae
from tiny_pipelines import tiny_stable_diffusion
from transformers import CLIPTokenizer


def test_each_word_is_one_token_and_survives_saving(tmp_path):
    made = build_tokenizer(captions())
    made.save_pretrained(tmp_path)
    for tokenizer in (made, CLIPTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(captions(), padding="max_length", truncation=True).input_ids
        assert len({row[2] for row in ids}) == len(captions()) == 6
        for row, text in zip(ids, captions(), strict=True):
            assert (len(row), row[0], row[4]) == (16, tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in row[1:4]
            assert tokenizer.decode(row, skip_special_tokens=True).strip() == text


def test_weights_are_the_seed_s_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first, second = tiny_stable_diffusion(), tiny_stable_diffusion()
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_default_size_is_about_a_million_parameters():
    assert 0.8e6 < sum(p.numel() for p in build_stable_diffusion().unet.parameters()) < 1.2e6


@pytest.mark.slow
def test_autoencoder_learns_and_its_scaling_factor_is_saved(tmp_path):
    pipe = tiny_stable_diffusion()
    images = read_landscapes(make_landscapes(tmp_path / "data", 16, 16))
    early = train_vae(pipe.vae, images, steps=1)
    assert train_vae(pipe.vae, images, steps=200) < 0.5 * early
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.vae.config.scaling_factor == pipe.vae.config.scaling_factor


def test_autoencoder_is_trained_on_squares_of_its_images_that_move():
    pipe, seen = tiny_stable_diffusion(), []
    # Each pixel says where it is.
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = torch.stack([rows, columns, 0 * rows])[None] / 16
    pipe.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    counted = []
    train_vae(pipe.vae, images, steps=4, batch_size=1, crop=8, on_step=counted.append)
    squares = seen[:4]  # then whole images, for the scaling factor
    assert [square.shape for square in squares] == [(1, 3, 8, 8)] * 4
    corners = [tuple((square[0, :2, 0, 0] * 16).int().tolist()) for square in squares]
    assert len(set(corners)) > 1
    for (top, left), square in zip(corners, squares, strict=True):
        assert torch.equal(square, images[:, :, top : top + 8, left : left + 8])
    assert seen[4].shape == images.shape
    assert counted == [1, 2, 3, 4]

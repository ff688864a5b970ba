import frozen_models
import numpy as np
import pytest
import torch
from frozen_training import Data, edges, first_step_by, started_by, states_of, x_0_at_pure_noise
from landscapes import all_details, landscape, make_landscapes
from small_stable_diffusion import build_stable_diffusion, flawed_scheduler
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.core.dct import dct
from zsnr_diffusers.core.low_frequency_law import LowFrequencyLaw


class Says(torch.nn.Module):
    """A network of v that says one x_0 whatever it sees."""

    def __init__(self, x_0, config):
        super().__init__()
        self.x_0, self.config = x_0, config

    def forward(self, x_t, timestep, states):
        assert timestep == 999
        return type("Output", (), {"sample": -self.x_0.expand(len(x_t), -1, -1, -1)})()


def x_0(pipe):
    side = pipe.unet.config.sample_size
    return torch.linspace(-1, 1, 4 * side * side).reshape(1, 4, side, side)


def flawed():
    pipe = tiny_stable_diffusion(flawed_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_first_step_is_that_of_the_x_0_which_is_said():
    """DDIM's last alpha is that of the first beta, so one step is all but x_0."""
    pipe = flawed()
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    with first_step_by(pipe, Says(x_0(pipe), pipe.unet.config)):
        pipe.scheduler.set_timesteps(1)
        x_t = torch.randn(x_0(pipe).shape, generator=torch.Generator().manual_seed(0))
        (first,), states = pipe.scheduler.timesteps, states_of(pipe, ["a"])
        step = pipe.scheduler.step(pipe.unet(x_t, first, encoder_hidden_states=states)[0], first, x_t)
        torch.testing.assert_close(step.pred_original_sample, x_0(pipe), rtol=0, atol=1e-4)
        said = pipe("a", latents=x_t, **call).images
    torch.testing.assert_close(said, step.prev_sample)
    assert not torch.allclose(pipe("a", latents=x_t, **call).images, said)


def test_a_start_by_a_network_has_its_low_frequencies_at_the_level_of_the_first_timestep():
    pipe = flawed()
    law = LowFrequencyLaw.of_amplitudes(torch.zeros(4, 2, 2), noise=0.0)
    latents = started_by(pipe, law, Says(x_0(pipe), pipe.unet.config), ["a", "b"], steps=5)
    alpha = float(pipe.scheduler.alphas_cumprod[801] ** 0.5)  # leading: 1, 201, ..., 801
    expected = alpha * dct(x_0(pipe), (2, 2)).expand(2, -1, -1, -1)
    torch.testing.assert_close(dct(latents, (2, 2)), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(latents[0], latents[1])


def test_x_0_is_minus_v_at_pure_noise():
    assert torch.equal(x_0_at_pure_noise(torch.tensor([2.0])), torch.tensor([-2.0]))


def test_qualities_and_edges_of_scenes():
    rng = np.random.default_rng(0)
    details = [scene for scene in all_details() if scene.light == "warm" and scene.season == "summer"]
    pixels = frozen_models.as_pixels([landscape(0.3, rng, 32, details=scene) for scene in details])
    found = frozen_models.qualities(pixels)
    np.testing.assert_allclose(found[:, 0], 0.3, atol=0.02)
    assert (found[:, 1] > 0).all()
    assert [np.sign(value) for value in found[:, 2]] == [1 if scene.side == "right" else -1 for scene in details]
    shown = edges(pixels)
    assert shown.shape == pixels.shape
    assert float(shown.min()) >= 0
    torch.testing.assert_close(edges(0.5 * pixels), shown)  # whatever the contrast


def test_a_real_image_is_drawn_for_each_prompt(tmp_path):
    data = Data.read(make_landscapes(tmp_path, 12, 16))
    drawn = data.draw(data.captions[::-1])
    assert drawn.captions == data.captions[::-1]
    for pixels, caption in zip(drawn.pixels, drawn.captions, strict=True):
        places = [i for i, text in enumerate(data.captions) if text == caption]
        assert any(torch.equal(pixels, data.pixels[i]) for i in places)
    assert frozen_models.even_prompts(data.captions, 12) == sorted(2 * sorted(set(data.captions)))


@pytest.mark.slow
def test_all_tables_and_adapters_that_stay_as_they_are(tmp_path, capsys):
    build_stable_diffusion().save_pretrained(tmp_path / "quickstart" / "flawed")
    make_landscapes(tmp_path / "quickstart" / "landscapes", 48, 64)
    options = {"images": 48, "finetune_steps": 2, "first_steps": 2, "adapter_steps": 2, "pictures": 8, "steps": 10}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    places = ["--quickstart", str(tmp_path / "quickstart"), "--output_dir", str(tmp_path / "frozen")]
    figures = frozen_models.main([*arguments, *places])
    text = capsys.readouterr().out
    assert list(figures) == ["levels", "plain", "detailed", "adapters"]
    for rows in figures.values():
        for name, row in rows.items():
            assert name in text
            assert np.isfinite([*row.values()]).all()
    assert list(figures["adapters"]) == ["LoRA", "LoRA, start", "ControlNet", "ControlNet, start"]
    assert text.count(" among them: unchanged") == 2
    assert figures["adapters"]["LoRA"] != figures["adapters"]["LoRA, start"]
    assert len(figures["detailed"]["start"]) > len(figures["plain"]["start"])

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from tiny_pipelines import (
    StubPipeline,
    StubTextPipeline,
    tiny_stable_diffusion,
    tiny_unconditional,
    zero_snr_scheduler,
)

from zsnr_diffusers.evaluation import terminal_invariance


def constant(value):
    return lambda x_t, **_: torch.full_like(x_t, value)


def test_constant_v_is_invariant():
    result = terminal_invariance(StubPipeline(constant(-0.25)))
    assert result.share == 0
    assert result.shares == (0,)
    assert result.luminance_std == 0
    assert result.rms == pytest.approx(0.25)
    assert (result.timestep, result.alpha, result.prompts) == (999, 0, (None,))


def test_constant_zero_is_invariant_too():
    assert terminal_invariance(StubPipeline(constant(0.0))).share == 0


def test_v_that_passes_the_noise_through_is_not():
    result = terminal_invariance(StubPipeline(lambda x_t: -x_t, size=32), num_noises=16)
    assert result.share == pytest.approx(1, abs=0.01)
    assert result.rms == pytest.approx(1, abs=0.02)


def test_share_of_a_mixture():
    # x_0 = 0.6 + 0.8 noise: mean^2 0.36, variance 0.64.
    result = terminal_invariance(StubPipeline(lambda x_t: -(0.6 + 0.8 * x_t), size=64), num_noises=16)
    assert result.share == pytest.approx(0.64, abs=0.01)


@pytest.mark.parametrize("num_noises", [2, 3, 8])
def test_share_does_not_depend_on_the_number_of_noises(num_noises):
    shares = [
        terminal_invariance(StubPipeline(lambda x_t: -(0.6 + 0.8 * x_t), size=32), num_noises=num_noises, seed=100 * i)
        for i in range(20)
    ]
    assert np.mean([result.share for result in shares]) == pytest.approx(0.64, abs=0.01)


def test_luminance_std_of_pixels_is_that_of_their_means():
    # Every pixel is 0.1 times the first value of the noise, so the luminance is too.
    def function(x_t):
        return -0.1 * x_t[:, :1, :1, :1].expand_as(x_t)

    result = terminal_invariance(StubPipeline(function), num_noises=5, seed=3)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(5)]
    first = [float(torch.randn((1, 3, 8, 8), generator=generator)[0, 0, 0, 0]) for generator in generators]
    assert result.luminance_std == pytest.approx(0.1 * np.std(first, ddof=1), rel=1e-5)


def test_decoding_can_be_left_out():
    assert terminal_invariance(StubPipeline(constant(1.0)), decode=False).luminance_std is None


def test_epsilon_model_on_a_stock_schedule():
    # With eps = (x - alpha c) / sigma the prediction of x_0 is c, whatever the noise.
    scheduler = zero_snr_scheduler("epsilon", zero=False)
    alpha = float(scheduler.alphas_cumprod[-1].double().sqrt())
    sigma = (1 - alpha**2) ** 0.5

    result = terminal_invariance(StubPipeline(lambda x: (x - alpha * 0.5) / sigma, scheduler))
    assert result.alpha == pytest.approx(alpha) != 0
    assert result.share == pytest.approx(0, abs=1e-6)
    assert result.rms == pytest.approx(0.5, abs=1e-3)  # float32 output, divided by alpha = 0.006
    assert terminal_invariance(StubPipeline(lambda x: x * 0.9, scheduler)).share == pytest.approx(1, abs=0.2)


def test_sample_prediction():
    assert terminal_invariance(StubPipeline(constant(0.5), zero_snr_scheduler("sample"))).rms == pytest.approx(0.5)


def test_epsilon_model_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match="epsilon"):
        terminal_invariance(StubPipeline(constant(0.0), zero_snr_scheduler("epsilon")))


def test_faked_zero_snr_counts_as_zero():
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) == 2.0**-24
    result = terminal_invariance(StubPipeline(constant(-0.5), scheduler))
    assert (result.alpha, result.share) == (0, 0)


def test_variance_channels_are_left_out():
    def learned_variance(x_t):
        return torch.cat([torch.full_like(x_t, 0.5), torch.randn_like(x_t)], dim=1)

    assert terminal_invariance(StubPipeline(learned_variance, out_channels=6)).share == 0


def test_batches_cover_all_noises_at_the_last_timestep():
    pipe = StubPipeline(lambda x_t: -x_t)
    whole = terminal_invariance(pipe, num_noises=7, batch_size=7)
    assert terminal_invariance(pipe, num_noises=7, batch_size=3) == whole
    assert pipe.unet.batches == [7, 3, 3, 1]
    assert set(pipe.unet.timesteps) == {999}


def test_prompts_are_measured_one_by_one_with_the_same_noises():
    def function(x_t, encoder_hidden_states):
        length = encoder_hidden_states.view(-1, 1, 1, 1)
        return torch.where(length > 3, x_t, torch.ones_like(x_t))

    result = terminal_invariance(StubTextPipeline(function, size=32), ["cat", "polar bear", "a white page"])
    assert result.prompts == ("cat", "polar bear", "a white page")
    assert result.shares[0] == 0
    assert result.shares[1] == result.shares[2] == pytest.approx(1, abs=0.02)
    assert result.share == pytest.approx(2 / 3, abs=0.02)
    assert "polar bear" in str(result)


def test_dropout_does_not_count():
    pipe = StubPipeline(lambda x_t: torch.nn.functional.dropout(torch.ones_like(x_t), 0.5, pipe.unet.training))
    assert pipe.unet.training
    assert terminal_invariance(pipe).share == 0
    assert pipe.unet.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_noises": 1}, "num_noises >= 2"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"prompts": ["a cat"]}, "unconditional"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        terminal_invariance(StubPipeline(constant(0.0)), **arguments)


def test_text_model_needs_prompts():
    for prompts in (None, [], [3]):
        with pytest.raises(ValueError, match="texts"):
            terminal_invariance(StubTextPipeline(constant(0.0)), prompts)


def test_other_pipelines_are_refused():
    inpainting = StubPipeline(constant(0.0), channels=9, out_channels=4)
    with pytest.raises(ValueError, match="9 to 4 channels"):
        terminal_invariance(inpainting)
    flow = StubPipeline(constant(0.0))
    flow.scheduler = object()
    with pytest.raises(ValueError, match="alphas_cumprod"):
        terminal_invariance(flow)


def silence(unet, bias):
    """Make the last layer return the same at every pixel, whatever it sees."""
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.constant_(unet.conv_out.bias, bias)


def test_real_unconditional_pipeline():
    pipe = tiny_unconditional()
    before = terminal_invariance(pipe)
    assert 0.01 < before.share <= 1
    assert before.luminance_std > 0
    silence(pipe.unet, 0.3)
    after = terminal_invariance(pipe)
    assert after.share == pytest.approx(0, abs=1e-12)
    assert after.rms == pytest.approx(0.3)


@pytest.mark.full
def test_real_text_pipeline(tmp_path):
    pipe = tiny_stable_diffusion()
    before = terminal_invariance(pipe, ["black cat", "white snow"])
    assert before.shares[0] != before.shares[1]
    assert before.luminance_std > 0
    silence(pipe.unet, 0.3)
    after = terminal_invariance(pipe, ["black cat", "white snow"])
    assert after.share == pytest.approx(0, abs=1e-12)
    assert after.luminance_std == pytest.approx(0, abs=1e-6)


def test_sdxl_unet_gets_its_pooled_text_and_sizes():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=5 + 6 * 2,
    )
    seen = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    pipe = StubPipeline(None)
    pipe.unet, pipe.vae_scale_factor = unet, 8
    pipe.encode_prompt = lambda prompt, **_: (torch.ones(1, 3, 8), None, torch.ones(1, 5), None)
    result = terminal_invariance(pipe, ["black cat"], num_noises=3, decode=False)
    assert 0 < result.share <= 1
    assert seen[0]["text_embeds"].shape == (3, 5)
    assert seen[0]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 3


def test_half_precision_vae_is_upcast_for_the_moment(tmp_path):
    pipe = tiny_stable_diffusion()
    expected = terminal_invariance(pipe, "black cat").luminance_std
    pipe.vae.half()
    assert terminal_invariance(pipe, "black cat").luminance_std == pytest.approx(expected, rel=0.02)
    assert pipe.vae.dtype == torch.float16


def test_latents_are_scaled_as_the_vae_says(tmp_path):
    # A decoder that shows its latents: x_0 = 0.5 noise must reach it times std / scale + mean.
    pipe = StubPipeline(lambda x_t: -0.5 * x_t, size=4)
    decoded = []

    def decode(latents):
        decoded.append(latents)
        return SimpleNamespace(sample=latents.clamp(-1, 1))

    pipe.vae = SimpleNamespace(dtype=torch.float32, decode=decode, config=SimpleNamespace(scaling_factor=0.25))
    terminal_invariance(pipe, num_noises=2)
    pipe.vae.config.shift_factor = 0.1
    terminal_invariance(pipe, num_noises=2)
    pipe.vae.config.latents_mean, pipe.vae.config.latents_std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    terminal_invariance(pipe, num_noises=2)
    plain, shifted, normalised = decoded
    noise = torch.cat([torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(i)) for i in range(2)])
    torch.testing.assert_close(plain, 2 * noise)
    torch.testing.assert_close(shifted, 2 * noise + 0.1)
    channel = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalised, 2 * noise * (channel + 3) + channel)


def test_class_conditional_model_takes_labels():
    pipe = StubPipeline(lambda x_t, class_labels: x_t * class_labels.view(-1, 1, 1, 1))
    pipe.unet.config.num_class_embeds = 2
    assert terminal_invariance(pipe, [0, 1]).shares == pytest.approx((0, 1), abs=0.05)
    with pytest.raises(ValueError, match="class labels"):
        terminal_invariance(pipe, ["cat"])

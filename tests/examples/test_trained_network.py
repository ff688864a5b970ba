"""Few steps against many, on networks with random weights."""

import pytest
import torch
import trained_network
from tiny_pipelines import tiny_stable_diffusion, tiny_unet, zero_snr_scheduler

from zsnr_diffusers import (
    ClassConditionalPipeline,
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
)

LATENT = {"output_type": "latent", "guidance_scale": 3.0}


@pytest.fixture
def classes():
    """Three classes, and none; a scheduler that clips."""
    torch.manual_seed(0)
    unet = tiny_unet(num_class_embeds=4).eval()
    scheduler = ZeroSNRDDIMScheduler(prediction_type="v_prediction", beta_schedule="linear", clip_sample=True)
    pipe = ClassConditionalPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.full
def test_classes_take_the_place_of_prompts_and_figures_are_those_of_plain_calls(classes):
    sampled = trained_network.FewStepImages(classes, None, 2, 3.0)
    assert sampled.conditions == [0, 0, 1, 1, 2, 2]
    table = trained_network.measure(sampled, [3], many=12)
    config = {**sampled.config, "timestep_spacing": "trailing"}

    def latents(scheduler, n):
        classes.scheduler = scheduler
        return classes(sampled.conditions, latents=sampled.noise, num_inference_steps=n, **LATENT).images

    assert latents(classes.scheduler, 2).abs().max() > 1.5  # nothing clips, so samplers may differ
    exact = latents(ZeroSNRMultistepScheduler.from_config(config, solver_order=3), 12)
    ddim = latents(ZeroSNRDDIMScheduler.from_config(config), 3)
    off = [float((a - b).square().mean().sqrt() / exact.std()) for a, b in zip(ddim, exact, strict=True)]
    expected = torch.tensor(off).log().mean().exp().item()
    assert table["DDIM"][0][0] == pytest.approx(expected, rel=1e-3)
    assert set(trained_network.RIVALS) <= set(table)
    assert all(0 < error < 100 for name, ((error, _),) in table.items() if "Lu" not in name)


def test_a_flow_model_is_sampled_by_flow_samplers_with_one_call_a_step(classes):
    classes.scheduler = FlowMatchMultistepScheduler(shift=2.0)
    sampled, calls = trained_network.FewStepImages(classes, None, 1, 1.0), []
    makers = trained_network.samplers(sampled.config, None)
    assert set(makers) > {*trained_network.FLOW_STOCK, *trained_network.FLOW_RIVALS}
    classes.unet.register_forward_pre_hook(lambda network, args: calls.append(float(args[1])))
    exact = sampled(trained_network.references(sampled.config)[0], 40)
    errors = {}
    for name, make in makers.items():
        calls.clear()
        errors[name], _ = trained_network.errors(sampled(make(), 6), exact)
        assert len(calls) == (7 if name == "Heun" else 6), name
        assert calls[0] == pytest.approx(1000, abs=2), name
    assert all(0 < error < 1 for error in errors.values())
    assert errors["FlowMatchMultistepScheduler"] < errors["UniPC"] < errors["Euler"]


def test_shifts_are_the_models_but_where_a_row_has_its_own(classes):
    classes.scheduler = FlowMatchMultistepScheduler(shift=2.0)
    makers = trained_network.samplers(classes.scheduler.config, None)
    made = {name: make().config for name, make in makers.items()}
    assert made["Euler"]["shift"] == made["Heun"]["shift"] == made["the same, trailing"]["shift"] == 2
    assert made["DPM++ 2M"]["flow_shift"] == made["UniPC"]["flow_shift"] == made["DEIS"]["flow_shift"] == 2
    assert made["Euler, shift 3"]["shift"] == made["UniPC, shift 3"]["flow_shift"] == 3
    for name in trained_network.FLOW_RIVALS:
        assert made[name]["shift"] == (3 if "shift 3" in name else 1), name


def test_errors_of_a_shift_and_of_noise_without_a_mean():
    exact = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shift, brightness = trained_network.errors(exact + 0.5, exact)
    assert shift == pytest.approx(0.5 / exact.std().item(), rel=1e-5)
    assert brightness == pytest.approx(0.5 / exact.mean((2, 3)).std().item(), rel=1e-5)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    flat, brightness = trained_network.errors(exact + 0.5 * stripes, exact)
    assert flat == pytest.approx(shift, rel=1e-5)
    assert brightness < 1e-5


@pytest.mark.full
def test_the_command_prints_a_row_for_each_sampler_of_a_folder(classes, tmp_path, capsys):
    classes.save_pretrained(tmp_path)
    options = ["--seeds", "1", "--steps", "2", "3", "--reference_steps", "6", "--guidance_scale", "1.1"]
    trained_network.main(["--pipeline", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert "guidance 1.1, 3 images" in printed
    rows = {line[:28].rstrip(): line[28:].split() for line in printed.splitlines()}
    for name in (*trained_network.RIVALS, "DDIM", "ZeroSNRMultistepScheduler", "the same, trailing"):
        assert len(rows[name]) == 4
    with pytest.raises(SystemExit):
        trained_network.main(["--pipeline", str(tmp_path), "--prompts", "a nine"])
    assert "leave --prompts, --prompts_file and --num_prompts out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num_prompts", "0"], "--num_prompts 0 must be at least 1"),
        (["--prompts_file", "missing.txt"], "--prompts_file 'missing.txt': no such file"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_is_loaded(wrong, message, capsys):
    with pytest.raises(SystemExit):
        trained_network.main(["--pipeline", "no-such-folder", *wrong])
    assert message in capsys.readouterr().err


def test_the_command_knows_a_flow_model_by_its_scheduler(classes, tmp_path, capsys):
    classes.scheduler = FlowMatchEulerScheduler()
    classes.save_pretrained(tmp_path)
    options = ["--pipeline", str(tmp_path), "--seeds", "1", "--steps", "2", "--reference_steps", "4"]
    trained_network.main(options)
    printed = capsys.readouterr().out
    assert "Euler, 4 steps" in printed
    assert "FlowMatchMultistepScheduler" in printed
    with pytest.raises(SystemExit):
        trained_network.main([*options, "--calibrated", str(tmp_path)])
    assert "leave --calibrated out" in capsys.readouterr().err


def test_texts_are_as_before():
    pipe = tiny_stable_diffusion(zero_snr_scheduler())
    pipe.set_progress_bar_config(disable=True)
    sampled = trained_network.FewStepImages(pipe, ["a dark hill", "a bright lake"], 2, 1.0)
    assert sampled.conditions == ["a dark hill"] * 2 + ["a bright lake"] * 2
    assert len(trained_network.FewStepImages(pipe, None, 1, 1.0).conditions) == len(trained_network.PROMPTS)
    scheduler = ZeroSNRDDIMScheduler.from_config(sampled.config)
    found = sampled(scheduler, 3)
    expected = pipe(
        sampled.conditions,
        latents=sampled.noise,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected)

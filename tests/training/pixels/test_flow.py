"""Flow matching around pixel-space networks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from PIL import Image
from tiny_pipelines import tiny_unet
from training_runs import launched, logged, same, trained

from zsnr_diffusers import ClassConditionalPipeline, FlowMatchMultistepScheduler, ZeroSNRDDPMScheduler, load_pipeline
from zsnr_diffusers.bridges import as_flow_model
from zsnr_diffusers.core import flow_level, flow_times, loss_weights, schedule_table, variance_preserving
from zsnr_diffusers.training import PixelTrainingConfig, train
from zsnr_diffusers.training.loss import LossWeighting
from zsnr_diffusers.training.pixels import PixelTask
from zsnr_diffusers.training.run import create_trainer

FLOW = {"prediction_type": "flow_prediction"}


@pytest.fixture
def options(options):
    return {**options, **FLOW}


def run(options, **changes):
    return trained(PixelTrainingConfig(**{**options, **changes}))


def drawn(options, count, **changes):
    """The first samples of a run, as its trainer gets them."""
    config = PixelTrainingConfig(**{**options, **changes})
    task = PixelTask(config)
    trainer = create_trainer(config, *launched(config), task, task.samples(range(12), config.global_batch(1)))
    return [trainer.samples[position] for position in range(count)], task


# -- the objective


def test_the_target_is_noise_less_x_0_on_the_straight_path(options):
    _, task = drawn(options, 1)
    x_0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    asked = task.objective.noised_batch(x_0, noise, torch.tensor([1000.0, 250.0, 31.25]))
    s = torch.tensor([1.0, 0.25, 0.03125]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(asked.x_t, (1 - s) * x_0 + s * noise)
    assert torch.equal(asked.target, noise - x_0)
    assert asked.timestep.tolist() == [1000.0, 250.0, 31.25]
    assert asked.convert_output(noise) is noise


def test_losses_of_a_run_are_those_computed_by_hand(options):
    options |= {"learning_rate": 1e-12, "dropout": 0.0, "report_to": "tensorboard", "flow_shift": 2.0}
    options |= {"timestep_sampling": "stratified", "train_batch_size": 4, "max_train_steps": 2}
    run(options)
    samples, task = drawn({**options, "output_dir": options["output_dir"] + "-hand"}, 8)
    unet, by_hand = task.unet.eval(), []
    for one in samples:
        s, noise, x_0 = one["timestep"] / 1000, one["noise"], one["pixel_values"]
        with torch.no_grad():
            output = unet(((1 - s) * x_0 + s * noise)[None], 1000 * s, one["class_labels"][None]).sample[0]
        by_hand.append(float((output - (noise - x_0)).square().mean()))
    found = [value for _, value in logged(options["output_dir"])["loss"]]
    assert found == pytest.approx([sum(by_hand[:4]) / 4, sum(by_hand[4:]) / 4], rel=1e-5)


@pytest.mark.parametrize("name", ["constant", "min_snr_floored", "soft_min_snr_floored"])
def test_a_weighting_is_the_same_loss_of_x_0_as_under_v(options, name):
    """The error of x_0 is that of v times sigma, and that of noise - x_0 times s."""
    s = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    weighting = LossWeighting(PixelTrainingConfig(**options, loss_weighting=name), None, torch.device("cpu"))
    found = weighting(torch.ones(6), (1000 * s).float()).double()
    if name == "constant":
        assert torch.equal(found, torch.ones(6, dtype=torch.float64))
        return
    level = variance_preserving(flow_level(s))
    of_x_0 = loss_weights(name, level, "v_prediction") / level.sigma**2
    torch.testing.assert_close(found, of_x_0 * s**2, rtol=1e-5, atol=0)
    assert found[-1] == pytest.approx(1)  # pure noise counts as under v


def test_learned_uncertainty_reads_the_level(options):
    config = PixelTrainingConfig(**options, loss_weighting="learned_uncertainty")
    weighting = LossWeighting(config, None, torch.device("cpu"))
    losses = torch.rand(3)
    assert torch.equal(weighting(losses, torch.tensor([1.0, 500.0, 1000.0])), losses)  # u starts at 0
    weighting(losses, torch.tensor([1.0, 500.0, 1000.0])).sum().backward()
    assert weighting.log_variance.coefficients.grad.abs().min() > 0


def test_snr_sampling_takes_the_betas_of_the_run(options):
    """Of a new network those of the options, at zero terminal SNR."""
    samples, _ = drawn(options, 4, flow_time_sampling="snr", beta_schedule="scaled_linear", beta_end=0.012)
    table = schedule_table("scaled_linear", 1000, 1e-4, 0.012, rescale_betas_zero_snr=True)
    uniform, _ = drawn({**options, "output_dir": options["output_dir"] + "-u"}, 4, flow_time_sampling="uniform")
    u = torch.stack([one["timestep"] for one in uniform]).double() / 1000
    wanted = 1000 * flow_times(u, "snr", alphas_cumprod=table)
    # u went through float32
    torch.testing.assert_close(torch.stack([one["timestep"] for one in samples]).double(), wanted, rtol=0, atol=1e-3)


# -- runs


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, {"timestep_sampling": "stratified", "loss_weighting": "learned_uncertainty"}])
def test_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path, changes):
    whole = run(options, output_dir=str(tmp_path / "whole"), **changes)
    run(options, max_train_steps=2, **changes)
    assert same(run(options, resume=True, **changes), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow_shift": 3.0}, "--flow_shift was 1.0 and is now 3.0"),
        ({"flow_time_sampling": "uniform"}, "--flow_time_sampling was 'logit_normal' and is now 'uniform'"),
    ],
)
def test_a_run_goes_on_with_the_flow_it_began_with(options, changes, message):
    run(options, max_train_steps=1)
    with pytest.raises(ValueError, match=message):
        run(options, resume=True, **changes)


@pytest.mark.slow
def test_three_hundred_steps_lower_the_loss_and_samples_come_near(options, tmp_path):
    """Three classes of one grey each; a new network generates noise, the trained one the grey that is asked for."""
    greys = [20, 128, 235]
    for i, grey in enumerate(greys):
        (tmp_path / "greys" / str(i)).mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(tmp_path / "greys" / str(i) / "0.png")
    options |= {"train_data_dir": str(tmp_path / "greys"), "in_channels": 1, "train_batch_size": 8}
    options |= {"learning_rate": 2e-3, "ema_decay": 0.9, "lr_scheduler": "cosine", "report_to": "tensorboard"}
    run(options, max_train_steps=300, checkpointing_steps=300)
    losses = [value for _, value in logged(options["output_dir"])["loss"]]
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    pipe = load_pipeline(options["output_dir"])
    pipe.set_progress_bar_config(disable=True)
    for scheduler in (pipe.scheduler, FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        images = pipe([0, 1, 2], num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
        # 300 steps leave a shade open; the classes' greys are over 100 apart
        assert [float(np.asarray(image).mean()) for image in images] == pytest.approx(greys, abs=30)


@pytest.mark.full
def test_previews_are_sampled_by_the_multistep_sampler(options, monkeypatch):
    seen, choose = [], ClassConditionalPipeline._resolve_labels

    def spy(self, *args):
        seen.append(type(self.scheduler))
        return choose(self, *args)

    monkeypatch.setattr(ClassConditionalPipeline, "_resolve_labels", spy)
    run(options, validation_images=1, luminance_images=2, validation_steps=2, num_inference_steps=2)
    assert set(seen) == {FlowMatchMultistepScheduler}
    assert Path(options["output_dir"], "luminance.png").is_file()


# -- what is shipped

STOCK_ALONE = """
import sys
sys.modules["zsnr_diffusers"] = None  # importing it raises, as if it were not installed
import torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    labels = folder.endswith("label")
    more = {"custom_pipeline": folder, "trust_remote_code": True} if labels else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [0, 2]} if labels else {"batch_size": 2}
    images = pipe(**call, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3) and images.std() > 0, images
"""


@pytest.mark.full
def test_people_without_this_package_sample_it(options, tmp_path):
    folders = [f"{tmp_path}/{column}" for column in (None, "label")]
    for folder, column in zip(folders, (None, "label"), strict=True):
        run(options, output_dir=folder, class_column=column, max_train_steps=1)
        assert type(load_pipeline(folder)) is (DDPMPipeline if column is None else ClassConditionalPipeline)
    result = subprocess.run([sys.executable, "-c", STOCK_ALONE, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("column", [None, "label"])
def test_it_opens_again_with_what_a_sampler_needs(options, column):
    run(options, class_column=column, max_train_steps=1, flow_shift=2.5, flow_time_sampling="uniform")
    pipe = load_pipeline(options["output_dir"])
    assert FlowMatchMultistepScheduler.from_config(pipe.scheduler.config).shift == 2.5
    facts = DPMSolverMultistepScheduler.load_config(options["output_dir"], subfolder="scheduler")
    assert facts["_class_name"] == "DPMSolverMultistepScheduler"
    assert (facts["prediction_type"], facts["use_flow_sigmas"], facts["flow_shift"]) == ("flow_prediction", True, 2.5)
    card = ModelCard.load(f"{options['output_dir']}/README.md")
    assert {"flow-matching", "flow_prediction"} <= set(card.data.tags)
    assert "zero-terminal-snr" not in card.data.tags
    for fact in ("noise - x_0", "1000 s", "| shift | `2.5` |", "flow times uniform, shift 2.5", "FlowMatchMultistep"):
        assert fact in card.text


# -- bases


@pytest.mark.full
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchMultistepScheduler()])
def test_a_flow_base_is_asked_as_it_was(options, tmp_path, scheduler):
    unet = tiny_unet()
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "base")
    options |= {"pretrained_model_name_or_path": str(tmp_path / "base"), "class_column": None}
    samples, task = drawn(options, 2)
    batch = torch.utils.data.default_collate(samples)
    s = (batch["timestep"] / 1000).reshape(-1, 1, 1, 1)
    asked = task.objective.noised_batch(batch["pixel_values"], batch["noise"], batch["timestep"])
    with torch.no_grad():
        found = task.predict(task.unet.eval(), asked.x_t, {**batch, "timestep": asked.timestep})
        x_s = (1 - s) * batch["pixel_values"] + s * batch["noise"]
        torch.testing.assert_close(found, unet.eval()(x_s, batch["timestep"]).sample, rtol=0, atol=1e-6)
    run({**options, "output_dir": options["output_dir"] + "-run"}, max_train_steps=1, luminance_images=1)
    with pytest.raises(ValueError, match=r"is a flow-matching model, which has no betas for v_prediction"):
        run(options, prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"--flow_time_sampling=snr is the density of betas"):
        run(options, flow_time_sampling="snr")


def test_through_a_bridge_a_v_base_is_the_flow_model_that_it_is_by_conversion(options, tmp_path):
    unet, betas = tiny_unet(), ZeroSNRDDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(unet, betas).save_pretrained(tmp_path / "base")
    options |= {"pretrained_model_name_or_path": str(tmp_path / "base"), "class_column": None}
    options |= {"flow_through_bridge": True, "report_to": "tensorboard", "max_train_steps": 1, "learning_rate": 1e-4}
    samples, task = drawn(options, 2)
    batch = torch.utils.data.default_collate(samples)
    s = (batch["timestep"] / 1000).reshape(-1, 1, 1, 1)
    x_s = (1 - s) * batch["pixel_values"] + s * batch["noise"]
    with as_flow_model(unet.eval(), betas), torch.no_grad():
        flow = unet(x_s, batch["timestep"]).sample
    asked = task.objective.noised_batch(batch["pixel_values"], batch["noise"], batch["timestep"])
    with torch.no_grad():
        answer = asked.convert_output(task.predict(task.unet.eval(), asked.x_t, {**batch, "timestep": asked.timestep}))
    torch.testing.assert_close(answer, flow, rtol=0, atol=1e-5)
    by_hand = float((flow - (batch["noise"] - batch["pixel_values"])).square().mean())
    run({**options, "output_dir": options["output_dir"] + "-run"})
    ((_, loss),) = logged(options["output_dir"] + "-run")["loss"]
    assert loss == pytest.approx(by_hand, rel=1e-6)
    shipped = load_pipeline(options["output_dir"] + "-run").scheduler.config
    assert (shipped.prediction_type, shipped.rescale_betas_zero_snr) == ("v_prediction", True)
    card = Path(options["output_dir"] + "-run", "README.md").read_text()
    assert "`flow_prediction`, by an exact conversion of `v_prediction`" in card


def test_only_a_v_base_goes_through_a_bridge(options, tmp_path):
    with pytest.raises(ValueError, match="--flow_through_bridge converts a base, but a new network has none"):
        run(options, flow_through_bridge=True)
    betas = ZeroSNRDDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=False)
    DDPMPipeline(tiny_unet(), betas).save_pretrained(tmp_path / "base")
    options |= {"pretrained_model_name_or_path": str(tmp_path / "base"), "class_column": None}
    with pytest.raises(
        ValueError, match=r"needs a base that predicts v at zero .* predicts epsilon .* SNR of 4\.036e-"
    ):
        run(options, flow_through_bridge=True)


def test_the_plan_says_what_is_drawn(options, capsys):
    train(PixelTrainingConfig(**options, dry_run=True, logit_mean=0.5))
    text = capsys.readouterr().out
    assert "flow times: logit-normal(0.5, 1), shift 1" in text
    assert "DPMSolverMultistepScheduler over flow times, shift 1" in text

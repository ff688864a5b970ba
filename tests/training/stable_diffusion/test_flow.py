"""Rectified flows around the UNets of Stable Diffusion: what is trained, what is shipped, and who samples it."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard
from landscapes import make_landscapes, read_landscapes
from PIL import Image
from published_models import IN_MEMORY, in_memory
from safetensors import safe_open
from safetensors.torch import load_file
from small_stable_diffusion import train_vae
from training_runs import launched, logged, same, trained

from zsnr_diffusers import (
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRStableDiffusionPipeline,
    load_pipeline,
)
from zsnr_diffusers.auditing import audit
from zsnr_diffusers.bridges import as_flow_model
from zsnr_diffusers.core import flow_level, ideal_output
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE
from zsnr_diffusers.schedulers.stock import stock_flow_scheduler
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.data.dataset import to_model_range
from zsnr_diffusers.training.reporting.luminance import read_luminance_file
from zsnr_diffusers.training.run import create_trainer
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

FLOW = {"prediction_type": "flow_prediction"}
POINT = 0.7
ROUNDED = 3e-3
"""Stock tells a network 1000 s rounded down. An error of 1e-3 in s is one of 1e-3 (x_s - x_0) / s in x_0, which is
1e-3 (noise - x_0) on the straight path; noise of these sizes is at most 4 from the point, so this is less than it."""


@pytest.fixture
def options(options):
    return {**options, **FLOW}


def run(options, **changes):
    return trained(TrainingConfig(**{**options, **changes}))


# -- the scheduler that is shipped


def sampled(scheduler, n, mean, std):
    """By a network that is exact for N(mean, std^2) and believes the timestep that it is told; and what is right."""
    noise = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(n)
    x = noise
    for t in scheduler.timesteps:
        v = ideal_output("flow_prediction", x.double(), flow_level(float(t) / 1000), mean, std).float()
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x, mean + std * noise


@pytest.mark.full
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("takes_generator", [False, True])
def test_stock_reaches_a_point_mass_at_every_number_of_steps(shift, takes_generator):
    for n in range(1, 31):
        scheduler = stock_flow_scheduler(FlowMatchMultistepScheduler(shift=shift), takes_generator)
        found, wanted = sampled(scheduler, n, POINT, 0.0)
        assert (found - wanted).abs().max() < 1.5 * ROUNDED, n
        found, wanted = sampled(FlowMatchMultistepScheduler.from_config(scheduler.config), n, POINT, 0.0)
        assert (found - wanted).abs().max() < 1e-5, n  # float32


@pytest.mark.parametrize(("takes_generator", "tolerances"), [(False, (0.05, 0.01)), (True, (0.15, 0.02))])
def test_stock_comes_to_the_law_of_a_gaussian(takes_generator, tolerances):
    """As wide as brightness and as data; at 10 and at 30 steps, where a first-order step leaves 0.40 and 0.14."""
    for n, tolerance in zip((10, 30), tolerances, strict=True):
        for mean, std in ((-0.4, 1.0), (-0.4, 2.5)):
            scheduler = stock_flow_scheduler(FlowMatchMultistepScheduler(), takes_generator)
            found, wanted = sampled(scheduler, n, mean, std)
            assert (found - wanted).square().mean().sqrt() < tolerance, (n, std)


def test_flow_models_of_other_kinds_have_no_stock_scheduler():
    with pytest.raises(ValueError, match=r"invert_sigmas=True, .*no diffusers scheduler samples such a flow model"):
        stock_flow_scheduler(FlowMatchMultistepScheduler(invert_sigmas=True))


# -- runs


def step_by_hand(options, unet, folder, bridge=None):
    """The loss of the first step, from the samples of a run and a UNet; `bridge` is hung around it meanwhile."""
    config = TrainingConfig(**{**options, "output_dir": f"{options['output_dir']}-hand", "cache": "none"})
    task, pipe = StableDiffusionTask(config), DiffusionPipeline.from_pretrained(folder)
    trainer = create_trainer(config, *launched(config), task, task.samples(range(10), config.global_batch(1)))
    batch = torch.utils.data.default_collate([trainer.samples[i] for i in range(config.train_batch_size)])
    with torch.no_grad():
        posterior = pipe.vae.encode(to_model_range(batch["pixel_values"])).latent_dist
        x_0 = (posterior.mean + posterior.std * batch["posterior_noise"]) * pipe.vae.config.scaling_factor
        s, text = (batch["timestep"] / 1000).reshape(-1, 1, 1, 1), pipe.text_encoder(batch["input_ids"])[0]
        output = unet.eval()((1 - s) * x_0 + s * batch["noise"], batch["timestep"], text).sample
    return float((output - (batch["noise"] - x_0)).square().mean())


def first_loss(options):
    run(options, max_train_steps=1, report_to="tensorboard")
    ((_, loss),) = logged(options["output_dir"])["loss"]
    return loss


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["epsilon", "stock flow", "shipped flow", "ours"])
def test_a_base_is_asked_with_its_own_weights_at_x_s(options, base_folder, tmp_path, scheduler):
    """So one that is a flow model already has its own loss at step 0, whatever scheduler it came with."""
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    if scheduler != "epsilon":
        pipe = StableDiffusionPipeline.from_pretrained(base)
        kinds = {
            "stock flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "shipped flow": stock_flow_scheduler(FlowMatchMultistepScheduler(shift=3.0)),
            "ours": FlowMatchMultistepScheduler(),
        }
        pipe.scheduler = kinds[scheduler]
        pipe.save_pretrained(base)
    options |= {"pretrained_model_name_or_path": str(base), "train_batch_size": 4}
    if scheduler == "stock flow":  # which no pipeline of Stable Diffusion could call for the picture at step 0
        options["luminance_images"] = 1
    unet = DiffusionPipeline.from_pretrained(base_folder).unet
    assert first_loss(options) == pytest.approx(step_by_hand(options, unet, base_folder), rel=1e-5)
    if scheduler != "epsilon":
        with pytest.raises(ValueError, match="is a flow-matching model, which has no betas for v_prediction"):
            run(options, prediction_type="v_prediction", resume=False, output_dir=str(tmp_path / "v"))


def v_base(base_folder, path):
    """The base as one that predicts v at zero SNR."""
    shutil.copytree(base_folder, path)
    scheduler = EulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
    facts = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    EulerDiscreteScheduler.from_config(scheduler.config, **facts).save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_through_a_bridge_a_v_base_has_the_loss_of_its_prediction_converted(options, base_folder, tmp_path):
    base = v_base(base_folder, tmp_path / "base")
    options |= {"pretrained_model_name_or_path": str(base), "train_batch_size": 4, "flow_through_bridge": True}
    pipe = DiffusionPipeline.from_pretrained(base)
    betas = ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config)
    with as_flow_model(pipe.unet, betas):
        by_hand = step_by_hand(options, pipe.unet, base)
    assert first_loss(options) == pytest.approx(by_hand, rel=1e-6)
    shipped = DiffusionPipeline.from_pretrained(options["output_dir"]).scheduler
    assert type(shipped) is EulerDiscreteScheduler
    assert (shipped.config.prediction_type, shipped.config.rescale_betas_zero_snr) == ("v_prediction", True)
    options |= {"pretrained_model_name_or_path": str(base_folder), "output_dir": str(tmp_path / "epsilon")}
    with pytest.raises(
        ValueError, match=r"needs a base that predicts v at zero .* predicts epsilon .* SNR of 0\.00468"
    ):
        run(options)


@pytest.mark.full
def test_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path):
    options |= {"timestep_sampling": "stratified", "flow_time_sampling": "snr"}
    whole = run(options, output_dir=str(tmp_path / "whole"))
    run(options, max_train_steps=2)
    assert same(run(options, resume=True), whole)


@pytest.mark.full
def test_previews_are_sampled_by_the_multistep_sampler(options, monkeypatch):
    seen, call = [], ZeroSNRStableDiffusionPipeline.__call__

    @functools.wraps(call)
    def spy(self, *args, **kwargs):
        seen.append((type(self.scheduler), getattr(self.scheduler, "shift", None)))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ZeroSNRStableDiffusionPipeline, "__call__", spy)
    changes = {"validation_prompts": ["snow"], "luminance_images": 2, "max_train_steps": 1, "flow_shift": 2.0}
    run(options, **changes)
    assert set(seen) == {(FlowMatchMultistepScheduler, 2.0)}
    assert {path.name for path in Path(options["output_dir"], "previews").iterdir()} == {
        "step-000000.png",
        "step-000001.png",
    }


# -- what is shipped

FIVE = {
    "1.5": (
        *(StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
        *(StableDiffusionControlNetPipeline, StableDiffusionControlNetImg2ImgPipeline),
    ),
    "xl": (
        *(StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline),
        *(StableDiffusionXLControlNetPipeline, StableDiffusionXLControlNetImg2ImgPipeline),
    ),
}
PIPELINES = {name: classes[:3] for name, classes in FIVE.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_three_hundred_steps_bring_brightness_to_the_data_s_and_five_stock_pipelines_run_it(
    name, request, options, tmp_path
):
    data = make_landscapes(tmp_path / "data", count=10, image_size=64)
    options = options if name == "1.5" else {**request.getfixturevalue("xl_options"), **FLOW}
    pipe = DiffusionPipeline.from_pretrained(options["pretrained_model_name_or_path"])
    train_vae(pipe.vae, read_landscapes(data), steps=60)
    pipe.save_pretrained(tmp_path / "base")
    options |= {"pretrained_model_name_or_path": str(tmp_path / "base"), "train_data_dir": str(data), "resolution": 64}
    options |= {"max_train_steps": 300, "train_batch_size": 4, "learning_rate": 2e-3, "ema_decay": 0.9}
    options |= {"checkpointing_steps": 300, "validation_steps": 300, "luminance_images": 10, "num_inference_steps": 8}
    run(options, report_to="tensorboard")
    folder = Path(options["output_dir"])
    losses = [value for _, value in logged(folder)["loss"]]
    assert np.mean(losses[-30:]) < 0.7 * np.mean(losses[:3])
    luminance = read_luminance_file(folder)
    assert luminance[300].w1 < luminance[0].w1
    assert not any(finding.severity == "error" for finding in audit(folder).findings)
    assert type(load_pipeline(folder).scheduler) is FlowMatchMultistepScheduler

    pipe = DiffusionPipeline.from_pretrained(folder)
    parts = {key: value for key, value in pipe.components.items() if key != "image_encoder"}
    parts |= {"requires_safety_checker": False} if name == "1.5" else {}
    image = {"image": Image.new("RGB", (64, 64), "teal")}
    mask = {"mask_image": Image.new("L", (64, 64), 255)}
    control = {"controlnet": ControlNetModel.from_unet(pipe.unet)}
    calls = ({}, {**image, "strength": 1.0}, {**image, **mask, "strength": 1.0}, image)
    calls += ({**image, "control_image": image["image"], "strength": 1.0},)
    for cls, call in zip(FIVE[name], calls, strict=True):
        one = cls(**parts, **(control if "ControlNet" in cls.__name__ else {}))
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found = one("a dark landscape", num_inference_steps=7, generator=generator, output_type="np", **call).images
        assert np.isfinite(found).all(), cls
        assert found.std() > 0


@pytest.fixture
def flow_folder(request, options):
    """What a run on one of `PIPELINES` ships."""
    name = request.param
    chosen = options if name == "1.5" else {**request.getfixturevalue("xl_options"), **FLOW}
    run(chosen, max_train_steps=1, flow_shift=1.5)
    return name, Path(chosen["output_dir"])


@pytest.mark.full
@pytest.mark.parametrize("flow_folder", PIPELINES, indirect=True)
def test_stock_pipelines_sample_it(flow_folder):
    """With its own network, then with one that is exact for one point: there the latents are this point."""
    name, folder = flow_folder
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is PIPELINES[name][0]
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    assert type(load_pipeline(folder).scheduler) is FlowMatchMultistepScheduler
    image, mask = Image.new("RGB", (64, 64), "teal"), np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    more = {} if name == "xl" else {"requires_safety_checker": False}
    calls = [{}, {"image": image, "strength": 0.6}, {"image": image, "mask_image": Image.fromarray(mask)}]

    def generate(cls, call, **others):
        parts = {key: value for key, value in pipe.components.items() if key not in ("image_encoder",) or value}
        made = cls(**parts, **more)
        made.set_progress_bar_config(disable=True)
        sides = {} if "strength" in call else {"height": 64, "width": 64}
        generator = torch.Generator().manual_seed(0)
        return made("snow", num_inference_steps=7, generator=generator, **sides, **call, **others).images

    for cls, call in zip(PIPELINES[name], calls, strict=True):
        assert np.isfinite(generate(cls, call, output_type="np", guidance_scale=3.0)).all()

    def exact(sample, timestep, *args, return_dict=True, **kwargs):
        return ((sample - POINT) / (torch.as_tensor(timestep) / 1000),)

    pipe.unet.forward = exact
    for cls, call in zip(PIPELINES[name], calls, strict=True):
        latents = generate(cls, call, output_type="latent", guidance_scale=1.0)
        if "mask_image" in call:
            latents = latents[..., 4:]  # right of the mask's edge
        assert (latents - POINT).abs().max() < 1.5 * ROUNDED, cls


STOCK_ALONE = """
import sys
sys.modules["zsnr_diffusers"] = None  # importing it raises, as if it were not installed
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.scheduler.config.flow_shift == 1.5
images = pipe("snow", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert images.isfinite().all() and images.std() > 0
ours = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
assert type(ours.scheduler).__name__ == "FlowMatchMultistepScheduler" and ours.scheduler.shift == 1.5
pipe = ours
IN_MEMORY
images = ours("snow", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("flow_folder", PIPELINES, indirect=True)
def test_people_without_this_package_sample_it(flow_folder, tmp_path):
    """By the scheduler that is saved, and by the code beside it as we do."""
    folder, generated = flow_folder[1], tmp_path / "generated.pt"
    code = STOCK_ALONE.replace("IN_MEMORY", IN_MEMORY)
    result = subprocess.run([sys.executable, "-c", code, folder, generated], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pipe = in_memory(load_pipeline(folder))
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    assert torch.equal(torch.load(generated), pipe("snow", **call).images)
    assert "not expected" not in result.stderr  # what stock says of a config that it does not understand
    assert "deprecat" not in result.stderr


def test_the_card_and_the_scheduler_say_what_it_is(options):
    run(options, max_train_steps=1, flow_shift=1.5, logit_mean=0.5)
    folder = Path(options["output_dir"])
    facts = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (facts["_class_name"], facts["use_flow_sigmas"], facts["flow_shift"]) == (
        "UniPCMultistepScheduler",
        True,
        1.5,
    )
    assert facts["prediction_type"] == "flow_prediction"
    assert json.loads((folder / "model_index.json").read_text())["scheduler"][1] == "UniPCMultistepScheduler"
    card = ModelCard.load(folder / "README.md")
    assert {"flow-matching", "rectified-flow", "stable-diffusion"} <= set(card.data.tags)
    assert "zero-terminal-snr" not in card.data.tags
    for fact in ("logit-normal(0.5, 1), shift 1.5", "| shift | `1.5` |", "1000 s", "ModelSamplingSD3", "noise - x_0"):
        assert fact in card.text
    assert "rescale_betas_zero_snr`" not in card.text


# -- LoRA


@pytest.mark.full
@pytest.mark.parametrize("use_dora", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_lora_says_that_it_is_of_a_flow_model(options, base_folder, tmp_path, monkeypatch, use_dora):
    options |= {"lora_rank": 2, "use_dora": use_dora, "flow_time_sampling": "uniform", "flow_shift": 2.0}
    train(TrainingConfig(**options))
    folder = Path(options["output_dir"])
    files = {LORA_FILE} if use_dora else {LORA_FILE, KOHYA_FILE}
    assert {path.name for path in folder.glob("*.safetensors")} == files
    for name in files:
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata()
        record = json.loads(metadata["zsnr_diffusers"])
        assert FlowMatchMultistepScheduler.from_config(record).shift == 2.0
        assert metadata["ss_discrete_flow_shift"] == "2.0"
        assert not {"ss_v_parameterization", "ss_zero_terminal_snr"} & {*metadata}
        assert metadata["modelspec.prediction_type"] == "flow_prediction"
    card = (folder / "README.md").read_text()
    assert "base_model_relation: adapter" in card
    (tmp_path / base_folder.name).symlink_to(base_folder)
    monkeypatch.chdir(tmp_path)
    stock, ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for code, cls in ((stock, UniPCMultistepScheduler), (ours, FlowMatchMultistepScheduler)):
        names = {}
        exec(code, names)
        assert type(names["pipe"].scheduler) is cls
        assert FlowMatchMultistepScheduler.from_config(names["pipe"].scheduler.config).shift == 2.0
        assert names["image"].size == (64, 64)


@pytest.mark.slow
def test_a_lora_of_xl_lowers_the_loss_and_goes_on_from_its_file(xl_options, tmp_path):
    options = {**xl_options, **FLOW, "lora_rank": 8, "learning_rate": 1e-2, "max_train_steps": 40}
    options |= {"checkpointing_steps": 40, "train_batch_size": 4, "lr_scheduler": "constant"}
    train(TrainingConfig(**{**options, "report_to": "tensorboard"}))
    losses = [value for _, value in logged(options["output_dir"])["loss"]]
    assert np.mean(losses[-10:]) < np.mean(losses[:3])
    options |= {"lora_rank": None, "lora_weights": options["output_dir"], "output_dir": str(tmp_path / "on")}
    train(TrainingConfig(**{**options, "max_train_steps": 1, "learning_rate": 1e-9}))
    before, after = (load_file(Path(folder, LORA_FILE)) for folder in (options["lora_weights"], options["output_dir"]))
    assert before.keys() == after.keys()
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-6


def test_the_plan_says_what_becomes_of_the_base(options, capsys):
    train(TrainingConfig(**options, dry_run=True))
    text = capsys.readouterr().out
    assert "prediction: epsilon -> flow_prediction" in text
    assert "SNR at the last timestep: 0.004682 -> 0" in text
    assert "flow times: logit-normal(0, 1), shift 1" in text
    assert "UniPCMultistepScheduler over flow times, shift 1" in text

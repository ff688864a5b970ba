import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard

from zsnr_diffusers import ClassConditionalPipeline, ZeroSNRDDPMScheduler, audit, load_pipeline
from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.training.kinds import open_task

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
    torch.save(torch.as_tensor(images), folder + "/images.pt")
"""


def saved(options, **changes):
    config = PixelTrainingConfig(**{**options, **changes})
    task, output = open_task(config)
    Path(config.output_dir).mkdir()
    output.save(task.unet.eval())
    return config.output_dir


@pytest.mark.full
def test_people_without_this_package_make_the_same_pictures(options, tmp_path):
    stock = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    folders = {
        (zero_snr, column): saved(
            options, class_column=column, output_dir=f"{tmp_path}/{zero_snr}-{column}", **({} if zero_snr else stock)
        )
        for zero_snr, column in itertools.product((True, False), (None, "label"))
    }
    result = subprocess.run([sys.executable, "-c", STOCK_ALONE, *folders.values()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not expected by DDPMScheduler" not in result.stderr  # what stock says of a config that is not its own
    for (zero_snr, column), folder in folders.items():
        theirs, pipe = torch.load(f"{folder}/images.pt"), load_pipeline(folder)
        assert type(pipe) is (DDPMPipeline if column is None else ClassConditionalPipeline)
        pipe.set_progress_bar_config(disable=True)
        spacing = pipe.scheduler.config.timestep_spacing
        pipe.scheduler = ZeroSNRDDPMScheduler.from_config(
            pipe.scheduler.config, rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing
        )
        call = {"batch_size": 2} if column is None else {"class_labels": [0, 2]}
        generator = torch.Generator().manual_seed(0)
        ours = pipe(**call, num_inference_steps=4, generator=generator, output_type="np").images
        # stock keeps its table in float32
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_scheduler_says_all_that_a_sampler_needs(options, variance_type):
    folder = saved(options, variance_type=variance_type, beta_schedule="scaled_linear", beta_start=8e-4, beta_end=0.01)
    facts = json.loads(Path(folder, "scheduler", "scheduler_config.json").read_text())
    assert facts["_class_name"] == "DDPMScheduler"
    assert (facts["beta_schedule"], facts["beta_start"], facts["beta_end"]) == ("scaled_linear", 8e-4, 0.01)
    assert (facts["prediction_type"], facts["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert (facts["timestep_spacing"], facts["variance_type"], facts["clip_sample"]) == (
        "trailing",
        variance_type,
        True,
    )
    result = audit(folder)
    assert result.verdict == "OK"
    # What no config of stock fixes; the large variance is for all T steps.
    large = {"large-variance"} if variance_type == "fixed_large" else set()
    assert {finding.name for finding in result.findings} == {"extra-timestep", "half-precision-noise"} | large


def test_model_card_names_the_classes(options):
    card = ModelCard.load(f"{saved(options)}/README.md")
    assert "zero-terminal-snr" in card.data.tags
    for fact in ("A new `small-8`", "0 cat, 1 dog, 2 owl", "v_prediction", "`trailing`", "class_labels=0"):
        assert fact in card.text


def test_model_card_of_a_stock_recipe_does_not_claim_zero_snr(options):
    kind = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "class_column": None}
    card = ModelCard.load(f"{saved(options, **kind)}/README.md")
    assert "zero-terminal-snr" not in card.data.tags
    assert "its own schedule" in card.text
    assert "DDPMPipeline" in card.text

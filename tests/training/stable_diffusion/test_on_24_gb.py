"""The configuration that trains all of SDXL on 24 GB, at small size: it runs, resumes, and what it saves loads."""

from pathlib import Path

import memory_table
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from training_runs import same, trained, weights

from zsnr_diffusers.training import TrainingConfig

CONFIG = Path(memory_table.__file__).parents[1] / "configs" / "sdxl-24gb.yaml"
OURS = ("pretrained_model_name_or_path", "output_dir", "resolution", "max_train_steps", "checkpointing_steps")
"""Options of the file that a small run has otherwise."""


@pytest.mark.full
def test_it_runs_resumes_and_what_it_saves_loads(xl_options, tmp_path):
    options = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    options = {name: value for name, value in options.items() if name not in OURS}
    options |= {**xl_options, "validation_rows": 2, "luminance_images": 2, "validation_steps": 4}
    options |= {"train_batch_size": 2, "learning_rate": 1e-3}
    shipped = trained(TrainingConfig(**{**xl_options, **options}))
    assert {value.dtype for value in shipped.values()} == {torch.bfloat16}
    (file,) = Path(options["output_dir"]).glob("checkpoint-000004/optimizer.safetensors")
    state = load_file(file)
    assert {value.dtype for name, value in state.items() if "exp_avg" in name} == {torch.float32}
    options["output_dir"] = str(tmp_path / "cut")
    trained(TrainingConfig(**{**options, "max_train_steps": 2}))
    assert same(trained(TrainingConfig(**{**options, "resume": True})), shipped)
    assert {path.name for path in (tmp_path / "cut" / "previews").iterdir()} >= {"step-000000.png", "step-000004.png"}
    pipe = DiffusionPipeline.from_pretrained(options["output_dir"])
    assert pipe.unet.dtype == torch.float32
    assert same({name: value.bfloat16() for name, value in pipe.unet.state_dict().items()}, shipped)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("snow", num_inference_steps=1, output_type="pt", height=64, width=64).images
    assert image.isfinite().all()
    assert weights(options["output_dir"]).keys() == shipped.keys()

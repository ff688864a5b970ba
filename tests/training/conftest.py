import pytest

from zsnr_diffusers.training import TrainingConfig


@pytest.fixture
def options(base_folder, image_folder, tmp_path):
    """A small run's options as a dictionary to change."""
    return {
        "pretrained_model_name_or_path": str(base_folder),
        "train_data_dir": str(image_folder),
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 2,
        "num_inference_steps": 2,
        "report_to": "none",
    }


@pytest.fixture
def config(options):
    return TrainingConfig(**options)

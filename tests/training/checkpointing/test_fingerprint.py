from types import SimpleNamespace

import datasets
import numpy as np

from zsnr_diffusers import FlowMatchMultistepScheduler, ZeroSNRDDPMScheduler
from zsnr_diffusers.training.checkpointing.fingerprint import compute_fingerprint
from zsnr_diffusers.training.data.encoded import write_encoded_rows

BETAS = {"num_train_timesteps": 40, "beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.03}


def a_task(betas, folder=None, schedule=None):
    image = {"bytes": b"an image", "path": "a.png"}
    rows = datasets.Dataset.from_dict({"image": [image], "text": ["a caption"]})
    return SimpleNamespace(
        rows=rows.cast_column("image", datasets.Image(decode=False)),
        data=SimpleNamespace(train_data_dir=None if folder is None else str(folder), image_column="image"),
        betas=betas,
        schedule=schedule or betas,
        initial_networks=dict,
    )


def test_the_schedule_is_that_of_the_betas():
    betas = ZeroSNRDDPMScheduler(**BETAS, prediction_type="v_prediction")
    assert compute_fingerprint(a_task(betas), [0])["schedule"] == BETAS
    flow = FlowMatchMultistepScheduler(num_train_timesteps=70)
    assert compute_fingerprint(a_task(betas, schedule=flow), [0])["schedule"] == BETAS
    assert compute_fingerprint(a_task(None, schedule=flow), [0])["schedule"] == {"num_train_timesteps": 70}


def test_betas_of_its_own_are_part_of_it():
    listed = np.linspace(0.002, 0.03, 40).tolist()
    betas = ZeroSNRDDPMScheduler(num_train_timesteps=40, trained_betas=listed, prediction_type="v_prediction")
    assert compute_fingerprint(a_task(betas), [0])["schedule"]["trained_betas"] == listed


def encode_one_row(folder, digit):
    folder.mkdir()
    sizes, hashes = np.array([[8, 8]]), np.full((1, 32), digit, dtype=np.uint8)
    write_encoded_rows(
        folder, {}, ["a.png"], ["a caption"], SimpleNamespace(values_array=sizes), SimpleNamespace(values_array=hashes)
    )
    return folder


def test_encoded_data_are_known_by_their_table(tmp_path):
    """Which has the hash of each image's file, so that no image need be there."""
    betas = ZeroSNRDDPMScheduler(**BETAS, prediction_type="v_prediction")
    folders = [encode_one_row(tmp_path / name, digit) for name, digit in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = (compute_fingerprint(a_task(betas, folder), [0])["data"]["sha256"] for folder in folders)
    assert first == same != other
    assert first != compute_fingerprint(a_task(betas), [0])["data"]["sha256"]

import argparse

import pytest
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.cli.generation import set_gpu_defaults


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", (None, None), (None, None)),
        ("cuda:1", (None, None), (16, "bfloat16")),
        ("cuda", (3, "float16"), (3, "float16")),
    ],
)
def test_what_is_not_given_is_what_a_gpu_is_fast_with(tmp_path, device, given, expected):
    tiny_stable_diffusion().save_pretrained(tmp_path)
    arguments = argparse.Namespace(pipeline=str(tmp_path), batch_size=given[0], dtype=given[1])
    set_gpu_defaults(arguments, device)
    assert (arguments.batch_size, arguments.dtype) == expected


def test_models_of_pixels_stay_in_float32(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    arguments = argparse.Namespace(pipeline=str(tmp_path), batch_size=None, dtype=None)
    set_gpu_defaults(arguments, "cuda")
    assert (arguments.batch_size, arguments.dtype) == (16, "float32")

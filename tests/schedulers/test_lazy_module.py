"""`zsnr_diffusers.schedulers`, which files name, is imported with the package, its classes once they are asked for."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, UNet2DModel

from zsnr_diffusers import ZeroSNRDDPMScheduler, schedulers

LOAD = """
import sys, zsnr_diffusers
assert not {"torch", "diffusers"} & {*sys.modules} and "zsnr_diffusers.schedulers" in sys.modules
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe.scheduler).__name__, pipe.scheduler.config.prediction_type)
"""


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_a_scheduler_is_of_the_module_that_files_name(name):
    cls = getattr(schedulers, name)
    for scheduler in (cls(), copy.deepcopy(cls()), pickle.loads(pickle.dumps(cls())), cls.from_config(cls().config)):
        assert type(scheduler) is cls
        assert (scheduler.__module__, cls.__qualname__) == ("zsnr_diffusers.schedulers", name)


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_the_source_of_a_class_is_found(name):
    assert inspect.getsource(getattr(schedulers, name)).startswith(f"class {name}(")


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_the_signature_of_a_class_is_that_of_its_constructor(name):
    cls = getattr(schedulers, name)
    assert [*inspect.signature(cls).parameters] == [*inspect.signature(cls.__init__).parameters][1:]


def test_a_class_derived_from_ours_is_of_its_own_module():
    class Derived(ZeroSNRDDPMScheduler):
        pass

    assert Derived().__module__ == __name__


@pytest.mark.full
def test_stock_opens_a_pipeline_with_one_of_ours_once_the_package_is_imported(tmp_path):
    unet = UNet2DModel(
        8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(unet, ZeroSNRDDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.stdout == "ZeroSNRDDPMScheduler sample\n", done.stderr

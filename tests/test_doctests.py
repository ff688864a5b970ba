"""The examples in docstrings of public names are run, and every function and class of `core` has one."""

import doctest
import importlib
import inspect

import pytest

import zsnr_diffusers
from zsnr_diffusers import core

WITHOUT = {
    # need a model on disk, or in memory: the guides show them, and are run
    *("load_lora", "load_pipeline", "save_lora", "save_pipeline", "write_custom_pipeline"),
    *("disable_guidance_rescale", "disable_start", "enable_guidance_rescale", "enable_start"),
    *("GuidanceError", "GuidanceRescaleMixin"),
    *(name for name in zsnr_diffusers.__all__ if "StableDiffusion" in name),
}
NAMED = [(core, name) for name in core.__all__ if callable(getattr(core, name))]
NAMED += [(zsnr_diffusers, name) for name in zsnr_diffusers.__all__ if name not in {*WITHOUT, *core.__all__}]


@pytest.mark.parametrize(("module", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_example_of_a_public_name_runs(module, name):
    thing = getattr(module, name)
    home = importlib.import_module(thing.__module__)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(thing, name, module=home, globs={})
    assert f" {name}" in example.docstring.partition("Examples:")[2]
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert not result.failed


def test_all_public_names_have_docstrings():
    for module in ("", ".core", ".evaluation", ".training", ".auditing", ".start", ".calibration", ".hub"):
        room = importlib.import_module(f"zsnr_diffusers{module}")
        things = {name: getattr(room, name) for name in room.__all__}
        assert [name for name, thing in things.items() if callable(thing) and not inspect.getdoc(thing)] == []

"""The examples in docstrings of public names are run; every function and class of `core` has one."""

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
NAMES = {
    core: [name for name in core.__all__ if callable(getattr(core, name))],
    zsnr_diffusers: [name for name in zsnr_diffusers.__all__ if name not in {*WITHOUT, *core.__all__}],
}
LISTED = ("", ".core", ".evaluation", ".training", ".auditing", ".start", ".calibration", ".hub")


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_the_examples_of_public_names_run(module):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in NAMES[module]:
        thing = getattr(module, name)
        (example,) = finder.find(thing, name, module=importlib.import_module(thing.__module__), globs={})
        assert f" {name}" in example.docstring.partition("Examples:")[2], name
        assert not runner.run(example).failed, name
    assert runner.tries > 2 * len(NAMES[module])


def test_all_public_names_have_docstrings():
    for module in LISTED:
        room = importlib.import_module(f"zsnr_diffusers{module}")
        things = {name: getattr(room, name) for name in room.__all__}
        assert [name for name, thing in things.items() if callable(thing) and not inspect.getdoc(thing)] == []

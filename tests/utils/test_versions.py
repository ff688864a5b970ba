import os
import subprocess
import sys
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

from zsnr_diffusers.utils.versions import TESTED, untested_versions, warn_of_untested_versions


@pytest.fixture
def said(caplog):
    caplog.set_level("WARNING", logger="zsnr_diffusers")
    return lambda: caplog.messages


@pytest.mark.parametrize(
    ("installed", "new"),
    [
        *((old, False) for old in ("1.99", "2.6.0", "2.14.1", "2.14.9+cu130")),
        *((new, True) for new in ("2.15.0", "2.15.0.dev20261201", "3.0")),
    ],
)
def test_a_minor_version_beyond_what_was_tested(monkeypatch, said, installed, new):
    monkeypatch.setattr("zsnr_diffusers.utils.versions.version", {**TESTED, "torch": installed}.__getitem__)
    assert untested_versions() == ({"torch": installed} if new else {})
    warn_of_untested_versions()
    assert [f"torch {installed} (tested up to {TESTED['torch']})" in line for line in said()] == [True] * new


def test_one_warning_names_all_of_them_in_one_process_of_several(monkeypatch, said):
    monkeypatch.setattr("zsnr_diffusers.utils.versions.version", lambda package: "99.0")
    warn_of_untested_versions()
    assert len(said()) == 1
    assert all(f"{package} 99.0" in said()[0] for package in TESTED)
    monkeypatch.setenv("RANK", "1")
    warn_of_untested_versions()
    assert len(said()) == 1


def test_what_is_not_installed_is_not_missed():
    assert untested_versions({"a_package_that_does_not_exist": "1.0"}) == {}


@pytest.mark.full
def test_import_warns_once():
    code = """
import importlib.metadata
true = importlib.metadata.version
importlib.metadata.version = lambda name: "99.0" if name == "datasets" else true(name)
import zsnr_diffusers, zsnr_diffusers.hub.load
"""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stderr.count("has not been tested with datasets 99.0") == 1


def test_no_requirement_keeps_a_newer_version_out():
    """pip would replace what a user has, a torch for CUDA by another one among it."""
    found = [Requirement(line) for line in requires("zsnr_diffusers")]
    capped = [str(one) for one in found for part in one.specifier if part.operator not in (">=", "!=")]
    assert capped == []
    assert {one.name for one in found} >= set(TESTED)
    assert all(one.specifier.contains(version(one.name)) for one in found if one.name in TESTED)

"""The distributions of a release hold what they need, and the wheel works away from the sources."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [Path(ROOT, ".ci/build"), folder]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def tracked(*folders):
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", *folders], check=True, capture_output=True, text=True
    ).stdout
    return set(files.splitlines())


def test_the_wheel_holds_the_package_only(built):
    (wheel,) = built.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {name for name in tracked("zsnr_diffusers") if not name.endswith(".md")}


def test_the_source_distribution_holds_what_its_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("tests", "examples", "zsnr_diffusers", ".ci", ".github") <= files
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= files


def test_the_wheel_works_in_a_fresh_environment(built):
    (wheel,) = built.glob("*.whl")
    command = [Path(ROOT, ".ci/try_wheel"), wheel, sysconfig.get_path("purelib")]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for shown in ("usage: zsnr", "verdict: ", "SNR at the last timestep: 0.004682 -> 0", "Wasserstein-1"):
        assert shown in done.stdout

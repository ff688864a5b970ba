"""The documentation site has every guide and every public name, and builds without a warning."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pages import GUIDES, ROOT

CONFIG = ROOT / ".github" / "mkdocs.yml"
MODULES = ("", "core", "evaluation", "training", "auditing", "start", "calibration", "hub")


def test_the_workflow_installs_what_the_extra_does():
    workflow = yaml.safe_load(Path(ROOT, ".github", "workflows", "docs.yml").read_text(encoding="utf-8"))
    (install,) = (step["run"] for step in workflow["jobs"]["build"]["steps"] if "pip install" in step.get("run", ""))
    extra = re.search(r"^docs =\n((?:    .+\n)+)", Path(ROOT, "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r'"([^"]+)"', install)) == sorted(extra[1].split())


@pytest.mark.full
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="needs the extra docs")
def test_it_builds_without_a_warning_and_has_every_public_name(tmp_path):
    command = ["mkdocs", "build", "--strict", "--config-file", str(CONFIG), "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for module in MODULES:
        page = Path(tmp_path, "api", module or "zsnr_diffusers", "index.html").read_text(encoding="utf-8")
        shown = {name.rpartition(".")[2] for name in re.findall(r'id="(zsnr_diffusers[\w.]*)"', page)}
        names = importlib.import_module(f"zsnr_diffusers.{module}".rstrip(".")).__all__
        assert {*names} <= shown
    assert Path(tmp_path, "figures", "before_after.png").is_file()
    overview = Path(tmp_path, "index.html").read_text(encoding="utf-8")
    assert [path.stem for path in GUIDES if f'href="guides/{path.stem}/"' not in overview] == []

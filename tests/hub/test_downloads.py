"""Pipelines from the Hub, by the real client."""

import os
import subprocess
import sys

from hub_server import serve
from tiny_checkpoints import V, sd_scheduler, write_file

from zsnr_diffusers import load_pipeline

FROM_THE_HUB = """
import sys, zsnr_diffusers
from zsnr_diffusers.model_facts import find_model_facts
facts = find_model_facts("acme/dark")
pipe = zsnr_diffusers.load_pipeline("acme/dark")
file = zsnr_diffusers.load_pipeline(sys.argv[1], config="acme/dark")
told = zsnr_diffusers.load_pipeline("acme/dark", prediction_type="epsilon", rescale_betas_zero_snr=False)
print(facts)
for one in (pipe, file, told):
    config = one.scheduler.config
    print(type(one.scheduler).__name__, config.prediction_type, config.rescale_betas_zero_snr)
"""


def test_from_the_hub(config_of, tmp_path):
    file = write_file(tmp_path / "model.safetensors", "1", ["v_pred"])
    (tmp_path / "repo").mkdir()
    load_pipeline(config_of("1", sd_scheduler(V, zero_snr=True))).save_pretrained(tmp_path / "repo")
    with serve({"acme/dark": tmp_path / "repo"}) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", FROM_THE_HUB, file]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    config = "the scheduler's config"
    assert result.stdout.splitlines() == [
        f"prediction_type='v_prediction' by {config}, rescale_betas_zero_snr=True by {config}",
        "DDIMScheduler v_prediction True",
        "DDIMScheduler v_prediction False",  # as programs read a file with v_pred alone
        "DDIMScheduler epsilon False",
    ], result.stderr

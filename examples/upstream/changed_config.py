"""Setting an attribute of `config` changes what a scheduler does, and `save_pretrained` writes the old value."""

import json
import tempfile
from pathlib import Path

from diffusers import DDIMScheduler

scheduler = DDIMScheduler()
scheduler.config.prediction_type = "v_prediction"
with tempfile.TemporaryDirectory() as folder:
    scheduler.save_pretrained(folder)
    saved = json.loads(Path(folder, "scheduler_config.json").read_text())["prediction_type"]
print("in use:", scheduler.config.prediction_type, "- saved:", saved)
assert scheduler.config.prediction_type == saved

import json

import detailed_landscapes
import pytest
import trained_network
from diffusers import DiffusionPipeline
from landscapes import detailed_captions
from PIL import Image

TINY = detailed_landscapes.Sizes(images=24, vae_steps=2, steps=2)


@pytest.mark.full
def test_the_model_is_made_once_and_compared(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "detailed"
    detailed_landscapes.main(folder, sizes=TINY)
    pipe = DiffusionPipeline.from_pretrained(folder / "trained")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert sorted(prompts) == sorted(detailed_captions())
    longest = max(len(pipe.tokenizer(prompt).input_ids) for prompt in prompts)
    assert longest == 16 == pipe.tokenizer.model_max_length  # a token for each word, and nothing is cut off
    with Image.open(folder / "samples.png") as picture:
        assert picture.width > detailed_landscapes.SEEDS * 128

    record = json.loads((folder / "progress.json").read_text())
    detailed_landscapes.main(folder, sizes=TINY)
    assert json.loads((folder / "progress.json").read_text()) == record
    with pytest.raises(SystemExit, match="steps 2, not 3"):
        detailed_landscapes.main(folder, sizes=detailed_landscapes.Sizes(images=24, vae_steps=2, steps=3))

    monkeypatch.setattr(trained_network, "beta_samplers", lambda config, calibrated: {})
    arguments = ["--pipeline", str(folder / "trained"), "--prompts_file", str(folder / "prompts.txt")]
    trained_network.main([*arguments, "--num_prompts", "3", "--seeds", "2", "--steps", "2", "--reference_steps", "4"])
    assert "guidance 1, 6 images" in capsys.readouterr().out

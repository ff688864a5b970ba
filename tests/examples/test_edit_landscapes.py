import edit_landscapes
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from edit_landscapes import brightness, dropped, kept, make_pairs, make_task, outlines, scene, to_tensor, widen
from landscapes import BRIGHTNESS_WORDS, caption, captions, landscape
from PIL import Image
from tiny_pipelines import seeded, tiny_stable_diffusion

from zsnr_diffusers.evaluation import mean_luminance


@pytest.mark.full
def test_trains_paints_in_all_settings_and_draws(tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "retrained")
    figures = edit_landscapes.main(tmp_path / "retrained", sizes=edit_landscapes.Sizes(8, 2, 2, 5))
    text = capsys.readouterr().out
    for name, row in figures.items():
        assert 0 <= row["error"] <= 2
        assert -1 <= row["kept"] <= 1
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f"| {row['error']:.3f} | {row['kept']:.2f} |")
    settings = {"text-to-image", "InstructPix2Pix"}
    settings |= {f"image-to-image, strength {strength}" for strength in edit_landscapes.STRENGTHS}
    data = {"data: the same scene", "the same, through the autoencoder", "data: another scene"}
    assert set(figures) == settings | data
    # Words are a sixth of the range wide, and a landscape lies anywhere within.
    assert figures["data: the same scene"]["error"] == pytest.approx(0.95 / 12, abs=0.05)
    assert figures["data: the same scene"]["kept"] > 0.7 > 0.4 > figures["data: another scene"]["kept"]
    with Image.open(tmp_path / "editing.png") as sheet:
        assert sheet.width > 7 * 16
        assert sheet.height > 6 * 16
    saved = DiffusionPipeline.from_pretrained(tmp_path / "instruct-pix2pix")
    assert type(saved).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert saved.unet.conv_in.weight[:, 4:].any()  # two steps are enough to leave zero


def test_a_widened_network_predicts_what_it_did_and_can_learn_from_the_picture():
    unet = tiny_stable_diffusion().unet
    wide = widen(unet)
    x, image = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    text = torch.randn(2, 77, 32, generator=seeded())
    before = unet(x, 500, text).sample
    predicted = wide(torch.cat([x, image], dim=1), 500, text).sample
    # the kernel may add eight channels up in another order than four
    torch.testing.assert_close(predicted, before, rtol=1e-5, atol=1e-5)
    predicted.square().mean().backward()
    assert wide.conv_in.weight.grad[:, 4:].abs().mean() > 0


def test_a_pair_is_one_scene_at_two_times_of_day():
    states = []
    for value in (-0.9, 0.1, 0.9):
        rng = np.random.default_rng(3)
        landscape(value, rng)
        states.append(rng.bit_generator.state)
    assert states[0] == states[1] == states[2]
    before, after, texts = make_pairs(12, 32, seed=0)
    said = [f"make it {caption(value)}" for value in mean_luminance(after)]
    assert np.mean([a == b for a, b in zip(said, texts, strict=True)]) > 0.8  # rounding moves those at a border
    assert np.abs(mean_luminance(before) - mean_luminance(after)).mean() > 0.3
    left, right = (
        [Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for x in batch]
        for batch in (before, after)
    )
    assert kept(left, right) > 0.7
    assert kept(left, right[1:] + right[:1]) < 0.3


def test_the_task_asks_for_every_brightness_of_scenes_that_no_pair_has():
    task = make_task(3, 16, seed=0)
    assert task.prompts == [text for text in captions() for _ in range(3)]
    assert len(task.sources) == len(task.same_scene) == len(task.other_scene) == 18
    assert np.abs(mean_luminance(task.same_scene) - task.asked).max() < 0.95 / 6 + 0.02
    assert len({scene(0.0, seed, index, 16).tobytes() for seed in (0, 1) for index in range(6)}) == 12
    assert to_tensor(task.sources).shape == (18, 3, 16, 16)


def test_words_and_their_brightness():
    for word, text in enumerate(captions()):
        assert all(caption(brightness(word, share)) == text for share in (0.01, 0.5, 0.99))
    assert brightness(0, 0) == -brightness(len(BRIGHTNESS_WORDS) - 1, 1) == -0.95


def test_conditions_are_dropped_as_often_as_the_paper_does():
    text, image = dropped(100_000, seeded())
    # five standard errors of a share of 5 %
    for both in (text & ~image, image & ~text, text & image):
        assert both.float().mean() == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 1e5) ** 0.5)


def test_outlines_do_not_see_the_exposure():
    logits = np.where(np.hypot(*np.mgrid[-16:16, -16:16]) < 9, -1.0, 1.0)[..., None].repeat(3, axis=-1)
    dark, light = (
        Image.fromarray(np.round(255 / (1 + np.exp(-(logits + shift)))).astype(np.uint8)) for shift in (-0.5, 0.5)
    )
    # half a grey level is up to 0.013 of these logits
    np.testing.assert_allclose(outlines(dark), outlines(light), atol=4 * 0.013 * 2**0.5)
    assert outlines(light).max() == pytest.approx(2 * 2**0.5, abs=0.1)
    assert kept([dark], [light]) == pytest.approx(1, abs=1e-3)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=f"python examples/quickstart.py --output_dir {tmp_path}"):
        edit_landscapes.main(tmp_path / "retrained")

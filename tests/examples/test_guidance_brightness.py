"""The measurement of brightness under guidance, on an untrained model."""

import dataclasses
import json

import diffusers
import guidance_brightness
import pytest
import torch
from guidance_brightness import Figures, Remedy
from landscapes import captions, make_landscapes
from PIL import Image
from small_stable_diffusion import build_stable_diffusion

from zsnr_diffusers import ZeroSNRDDIMScheduler, enable_guidance_rescale


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A folder as the quickstart makes it, with a model that records guidance of its own."""
    before = diffusers.utils.logging.get_verbosity()
    make_landscapes(tmp_path / "landscapes", 18)
    pipe = build_stable_diffusion()
    pipe.scheduler = ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "retrained")
    index = json.loads((tmp_path / "retrained" / "model_index.json").read_text())
    record = {"_guidance_rescale": 0.7, "_guidance_keep_low_frequencies": 4}
    (tmp_path / "retrained" / "model_index.json").write_text(json.dumps(index | record))
    monkeypatch.setattr(guidance_brightness, "NUM_INFERENCE_STEPS", 2)
    yield tmp_path
    diffusers.utils.logging.set_verbosity(before)


@pytest.mark.full
def test_every_remedy_is_measured_at_every_scale(quickstart, capsys):
    rows = guidance_brightness.main(quickstart, seeds=1, guidance_scales=[1.0, 7.5], figure=quickstart / "figure.png")
    text = capsys.readouterr().out
    assert {*rows} == {*guidance_brightness.remedies()}
    unguided, guided = zip(*rows.values(), strict=True)
    assert len({*unguided}) == 1  # there is nothing to remedy
    assert len({*guided}) > len(rows) - 3  # an untrained model predicts little that could be cut or zeroed
    for name, (first, second) in rows.items():
        assert f"| {name} | {first.w1:.3f} | {second.w1:.3f} |" in text
        assert f"| {name} | {first.clipped:.1%} | {second.clipped:.1%} |" in text
    assert f"floor {unguided[0].floor:.3f}" in text
    with Image.open(quickstart / "figure.png") as figure:
        assert figure.width > 5 * 64
        assert figure.height > len(captions()) * 64


@pytest.mark.full
def test_what_the_model_records_is_no_part_of_a_remedy(quickstart):
    generator = guidance_brightness.Generator(quickstart / "retrained", 1)
    found = generator(Remedy(), 7.5)
    pipe = enable_guidance_rescale(generator.pipe, 0.0)
    assert torch.equal(generator(Remedy(), 7.5), found)
    enable_guidance_rescale(pipe, 0.7, keep_low_frequencies=4)
    assert not torch.equal(generator(Remedy(), 7.5), found)


def test_detail_is_what_is_left_of_luma_without_its_lowest_frequencies():
    rows, columns = (torch.arange(64, dtype=torch.float64) + 0.5) * torch.pi / 64, torch.ones(64, dtype=torch.float64)
    for frequency, expected in ((7, 0.0), (8, 0.5**0.5), (20, 0.5**0.5)):  # of cosines of amplitude 1
        grey = torch.outer((frequency * rows).cos(), columns).expand(2, 3, 64, 64)
        assert guidance_brightness.detail(grey + 0.3) == pytest.approx(expected, abs=1e-9)


def test_tables_have_a_column_for_each_scale(capsys):
    figures = Figures(0.1234, 0.05, 0.02, 0.875, 0.99, 0.0456)
    worse = dataclasses.replace(figures, w1=0.3)
    guidance_brightness.show({"none": [figures, worse]}, [1.0, 7.5], 96)
    text = capsys.readouterr().out
    assert "W1 of mean luminance to the data, 96 images each; floor 0.050" in text
    assert text.count("| guidance | 1 | 7.5 |\n|---|---|---|\n") == len(guidance_brightness.TITLES)
    assert "| none | 0.123 | 0.300 |" in text
    assert "| none | 2.0% | 2.0% |" in text


def test_what_a_library_is_missing_for_is_left_out(monkeypatch, capsys):
    def missing(scale):
        raise ImportError("no kornia here")

    class Nothing:
        compare = staticmethod(lambda decoded: decoded)

    chosen = {"none": Remedy(), "decoupled": Remedy(missing)}
    monkeypatch.setattr(guidance_brightness, "remedies", lambda: chosen)
    rows = guidance_brightness.measure(lambda remedy, scale: (remedy, scale), Nothing, [1.0, 3.0])
    assert rows == {"none": [(Remedy(), 1.0), (chosen["none"], 3.0)]}
    assert "decoupled is left out: no kornia here" in capsys.readouterr().out


def test_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"retrained holds no pipeline; run examples/quickstart"):
        guidance_brightness.main(tmp_path)

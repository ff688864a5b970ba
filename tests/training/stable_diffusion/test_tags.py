"""Captions that are tags: their order and choice, by seed and place."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion
from training_runs import same, trained

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images, open_rows
from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.stable_diffusion.conditioning import Conditioning
from zsnr_diffusers.training.stable_diffusion.samples import CaptionedDataset, vary_tags

TAGS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=8)
CAPTION = "a cat, snow, a hill, night"


@given(TAGS, st.integers(0, 9), st.booleans(), st.integers(0, 99))
def test_the_first_stay_and_the_others_change_places_alone(tags, keep, shuffle, seed):
    varied = vary_tags(" , ".join(tags), shuffle, keep, 0.0, make_generator(seed))
    found = varied.split(", ") if varied else []
    assert found[:keep] == tags[:keep]
    assert sorted(found) == sorted(tags)
    assert shuffle or found == tags


def test_all_orders_come_alike_often():
    draw = make_generator(0)
    orders = Counter(vary_tags(CAPTION, True, 1, 0.0, draw) for _ in range(6000))
    assert set(orders) == {", ".join(["a cat", *order]) for order in itertools.permutations(CAPTION.split(", ")[1:])}
    assert all(abs(times - 1000) < 4 * math.sqrt(1000 * 5 / 6) for times in orders.values())


def test_each_other_tag_is_left_out_by_itself():
    draw, kept = make_generator(1), Counter()
    for _ in range(4000):
        kept.update(vary_tags(CAPTION, False, 1, 0.25, draw).split(", "))
    assert kept.pop("a cat") == 4000
    assert all(abs(times - 3000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for times in kept.values())
    assert vary_tags(CAPTION, True, 2, 1.0, draw) == "a cat, snow"
    assert vary_tags(" ,, ", True, 0, 0.5, draw) == ""


@pytest.fixture
def tagged(options, tmp_path):
    """A run on four images of the same tags."""
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(CAPTION)
    return {**options, "train_data_dir": str(tmp_path), "caption_dropout": 0.2}


def test_a_sample_is_the_same_but_for_its_caption_and_of_its_place_alone(tagged):
    tokenizer = tiny_stable_diffusion().tokenizer

    def samples(**changes):
        config = TrainingConfig(**{**tagged, **changes})
        rows = open_rows(config)
        images = check_images(rows, config, False)
        return CaptionedDataset(rows, images, config, Conditioning([tokenizer]), [(16, 16)], (4, 4), 1000)

    plain, varied = samples(), samples(shuffle_tags=True, keep_tags=1, tag_dropout=0.3)
    texts = set()
    for position in range(40):
        one, other = plain[position], varied[position]
        assert torch.equal(varied[position]["input_ids"], other["input_ids"])
        assert all(torch.equal(one[name], other[name]) for name in one if name != "input_ids")
        text, before = (tokenizer.decode(batch["input_ids"], skip_special_tokens=True) for batch in (other, one))
        assert (text == "") == (before == "")
        assert text == "" or text.startswith("a cat")
        texts.add(text)
    assert len(texts) > 10


@pytest.mark.full
def test_a_resumed_run_on_tags_is_the_uninterrupted_one_with_latents_stored(tagged, tmp_path):
    tagged |= {"shuffle_tags": True, "tag_dropout": 0.3}
    whole = trained(TrainingConfig(**{**tagged, "output_dir": str(tmp_path / "whole")}))
    trained(TrainingConfig(**{**tagged, "max_train_steps": 2}))
    assert same(trained(TrainingConfig(**{**tagged, "resume": True})), whole)
    assert {path.name.split("-")[0] for path in (tmp_path / "whole" / "cache").glob("*-*")} == {"latents"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_tags": 2}, "--keep_tags=2 has no effect without"),
        ({"shuffle_tags": True, "cache": "both"}, "--shuffle_tags changes captions each time"),
        ({"tag_dropout": 0.1, "cache": "text"}, "--tag_dropout=0.1 changes captions each time"),
        ({"tag_dropout": 1.5}, r"--tag_dropout=1.5 must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(tagged, changes, said):
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**{**tagged, **changes})

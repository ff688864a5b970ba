import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images, open_rows, to_model_range
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, create_dataloader, make_generator
from zsnr_diffusers.training.stable_diffusion.conditioning import Conditioning
from zsnr_diffusers.training.stable_diffusion.samples import CaptionedDataset

TOKENIZER = tiny_stable_diffusion().tokenizer


def open_images(config):
    return open_rows(config)


def samples(config, good=None, size=16):
    rows = open_images(config)
    good = check_images(rows, config, progress=False) if good is None else good
    return CaptionedDataset(rows, good, config, Conditioning([TOKENIZER]), [(size, size)], (4, 4), 1000)


def folder_of(path, images, captions=None):
    """An image folder of the given images, `{name: image or bytes}`."""
    path.mkdir(parents=True)
    for name, image in images.items():
        if isinstance(image, bytes):
            (path / name).write_bytes(image)
        else:
            image.save(path / name)
    lines = [{"file_name": name, "text": (captions or {}).get(name, "a cat")} for name in images]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def with_data(options, folder, **changes):
    return TrainingConfig(**{**options, "train_data_dir": str(folder), **changes})


# -- positions


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 5))
def test_a_step_takes_the_same_samples_however_it_is_divided(batch, accumulation, world, first, more):
    config = TrainingConfig(
        pretrained_model_name_or_path="b",
        train_data_dir="d",
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    taken = [list(DistributedBatchSampler(config, range(first, first + more), rank, world)) for rank in range(world)]
    size = batch * accumulation * world
    for step in range(more):
        passes = slice(step * accumulation, (step + 1) * accumulation)
        positions = sorted(p for rank in taken for one in rank[passes] for p in one)
        assert positions == list(range((first + step) * size, (first + step + 1) * size))


def test_generators_of_neighbouring_keys_are_unrelated():
    draws = torch.stack([torch.randn(1000, generator=make_generator(seed, 1, k)) for seed in (0, 1) for k in range(5)])
    correlation = torch.corrcoef(draws) - torch.eye(10)
    assert correlation.abs().max() < 5 / 1000**0.5
    assert torch.equal(torch.randn(3, generator=make_generator(7, 8)), torch.randn(3, generator=make_generator(7, 8)))


# -- samples


def test_every_epoch_shows_every_image_once_in_another_order(config):
    data = samples(config)
    orders = [data._epoch_order(epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_position_only(options, workers):
    config = TrainingConfig(**{**options, "dataloader_num_workers": workers, "max_train_steps": 8})
    whole = list(create_dataloader(samples(config), DistributedBatchSampler(config, range(8), 0, 1), config))
    torch.manual_seed(123)  # nothing may come from the global generator
    state = torch.get_rng_state()
    rest = list(create_dataloader(samples(config), DistributedBatchSampler(config, range(5, 8), 0, 1), config))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(rest) == 3
    for a, b in zip(whole[5:], rest, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(whole[0]["noise"], whole[5]["noise"])


def test_draws_are_what_they_are_said_to_be(options):
    config = TrainingConfig(**{**options, "caption_dropout": 0.25, "random_flip": True})
    data = samples(config)
    drawn = [data[position] for position in range(2000)]
    timesteps = torch.stack([one["timestep"] for one in drawn]).float()
    assert timesteps.min() < 10
    assert timesteps.max() >= 990
    assert timesteps.mean().item() == pytest.approx(499.5, abs=4 * 289 / 2000**0.5)
    noise = torch.stack([one["noise"] for one in drawn])
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    empty = TOKENIZER("", max_length=77, padding="max_length").input_ids
    dropped = sum(one["input_ids"].tolist() == empty for one in drawn) / 2000
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    images = Counter(one["pixel_values"].numpy().tobytes() for one in drawn)
    assert len(images) == 20  # ten images and their mirror images


def test_pixels_are_the_file_s_and_the_caption_is_the_row_s(config, image_folder):
    data = samples(config, size=64)
    lines = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    sample = next(data[p] for p in range(100) if data[p]["input_ids"][2] != TOKENIZER.pad_token_id)
    matches = [
        line["text"]
        for line in lines
        if np.array_equal(
            np.asarray(Image.open(image_folder / line["file_name"])),
            sample["pixel_values"].permute(1, 2, 0).numpy(),
        )
    ]
    assert len(matches) == 1
    words = TOKENIZER.decode(sample["input_ids"], skip_special_tokens=True)
    assert words.strip() == matches[0]


def test_odd_images_become_the_rgb_that_they_show(options, tmp_path):
    """Grey of 16 bits, transparency over white, photographs upright, other sizes cropped at the centre."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (24, 0, 40, 32))
    turned = Image.new("RGB", (16, 16), "white")
    turned.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    folder = folder_of(tmp_path / "odd", {"1.png": Image.fromarray(ramp), "2.png": clear, "3.png": wide})
    turned.save(tmp_path / "odd" / "4.png", exif=exif)
    with (tmp_path / "odd" / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "4.png", "text": "snow"}) + "\n")
    data = samples(with_data(options, folder))
    shown = {data._epoch_order(0)[p]: to_model_range(data[p]["pixel_values"]) for p in range(4)}
    assert shown[0][0].flatten().tolist() == pytest.approx((ramp.flatten() / 32767.5 - 1).tolist(), abs=0.005)
    assert bool((shown[1] == 1).all())
    assert bool((shown[2][2, :, 5:11] > 0.9).all())
    assert bool((shown[2][0, :, :3] > 0.9).all())
    assert bool((shown[3][:, :8] == 1).all())
    assert bool((shown[3][:, 8:] == -1).all())


def quarters():
    """An image of the model's size, a colour in each corner."""
    image = Image.new("RGB", (16, 16), "white")
    for place, colour in (((0, 0), "red"), ((8, 0), "lime"), ((0, 8), "blue")):
        image.paste(colour, (*place, place[0] + 8, place[1] + 8))
    return image


def half_clear():
    """Black, of which the left half is transparent."""
    image = Image.new("LA", (16, 16), (0, 255))
    image.paste((0, 0), (0, 0, 8, 16))
    return image


def wide():
    """Ten times as wide as high, with the corners in its middle."""
    image = Image.new("RGB", (160, 16))
    image.paste(quarters(), (72, 0))
    return image


def white_and_black():
    """What `half_clear` shows."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (8, 0, 16, 16))
    return image


@pytest.mark.parametrize(
    ("name", "image", "shown"),
    [
        ("palette.png", quarters().quantize(4), quarters()),
        ("print.tif", quarters().convert("CMYK"), quarters()),
        ("clear.png", half_clear(), white_and_black()),
        ("wide.png", wide(), quarters()),
        ("point.png", Image.new("RGB", (1, 1), (9, 200, 30)), Image.new("RGB", (16, 16), (9, 200, 30))),
    ],
    ids=["palette", "CMYK", "LA", "10:1", "1x1"],
)
def test_odd_images_are_exact_to_the_pixel(options, tmp_path, name, image, shown):
    data = samples(with_data(options, folder_of(tmp_path / "odd", {name: image}), caption_dropout=0.0))
    read = data[0]["pixel_values"].permute(1, 2, 0)
    assert np.array_equal(read, shown)


def test_captions_may_be_lists_or_missing(options, tmp_path):
    image = Image.new("RGB", (16, 16))
    folder = tmp_path / "lists"
    folder_of(folder, {"1.png": image})
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": ["a cat", "snow"]}) + "\n")
    data = samples(with_data(options, folder, caption_dropout=0.0))
    texts = {TOKENIZER.decode(data[p]["input_ids"], skip_special_tokens=True).strip() for p in range(20)}
    assert texts == {"a cat", "snow"}
    nothing = folder_of(tmp_path / "nothing", {"1.png": image, "2.png": image}, {"1.png": None})
    data = samples(with_data(options, nothing, caption_dropout=0.0))
    texts = Counter(TOKENIZER.decode(data[p]["input_ids"], skip_special_tokens=True).strip() for p in range(2))
    assert texts == {"": 1, "a cat": 1}


@pytest.mark.parametrize(
    "caption",
    ["", "snow " * 300, ["snow " * 300], [], "  a  cat "],
    ids=["empty", "300 words", "a list of 300 words", "an empty list", "spaces"],
)
def test_odd_captions_are_tokenized_as_stock_does(options, tmp_path, caption):
    folder = folder_of(tmp_path / "odd", {"1.png": Image.new("RGB", (16, 16))}, {"1.png": caption})
    data = samples(with_data(options, folder, caption_dropout=0.0))
    text = (caption or [""])[0] if isinstance(caption, list) else caption
    length = TOKENIZER.model_max_length
    stock = TOKENIZER(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert data[0]["input_ids"].tolist() == stock.input_ids[0].tolist()
    assert len(data[0]["input_ids"]) == length


def test_data_set_by_name(options, image_folder, tmp_path):
    """Whatever `datasets.load_dataset` opens: here a folder of Parquet, with the images inside."""
    folder = with_data(options, image_folder)
    rows = datasets.load_dataset("imagefolder", data_dir=str(image_folder), split="train")
    (tmp_path / "set").mkdir()
    rows.rename_column("text", "caption").to_parquet(tmp_path / "set" / "train.parquet")
    named = with_data(options, "", train_data_dir=None, dataset_name=str(tmp_path / "set"), caption_column="caption")
    for position in range(4):
        a, b = samples(folder)[position], samples(named)[position]
        assert all(torch.equal(a[key], b[key]) for key in a)


# -- bad input


@pytest.fixture
def damaged(tmp_path, image_folder):
    whole = (image_folder / "00000.png").read_bytes()
    good = Image.new("RGB", (16, 16))
    return folder_of(
        tmp_path / "damaged", {"a.png": good, "empty.png": b"", "cut.png": whole[: len(whole) // 2], "z.png": good}
    )


def test_broken_images_are_named_and_counted_before_training(options, damaged):
    config = with_data(options, damaged)
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be(?s:.)*empty.png(?s:.)*--on_bad_image") as e:
        check_images(open_images(config), config, progress=False)
    assert "cut.png" in str(e.value)


def test_broken_images_are_left_out_on_request(options, damaged, capsys):
    config = with_data(options, damaged, on_bad_image="skip")
    rows = open_images(config)
    assert check_images(rows, config, progress=False) == {0: (16, 16), 3: (16, 16)}
    assert "2 of 4 images cannot be read" in capsys.readouterr().out
    assert {samples(config)._epoch_order(0)[p] for p in range(2)} == {0, 3}


def test_nothing_left_is_an_error(options, tmp_path):
    config = with_data(options, folder_of(tmp_path / "x", {"a.png": b"", "b.png": b"no"}), on_bad_image="skip")
    with pytest.raises(ValueError, match="There are no images left"):
        check_images(open_images(config), config, progress=False)


def test_folder_without_captions_without_images_or_missing(options, tmp_path, image_folder):
    bare = tmp_path / "bare"
    shutil.copytree(image_folder, bare)
    (bare / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"10 images but no captions: add a metadata.jsonl .*00000.png"):
        open_images(with_data(options, bare))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        open_images(with_data(options, tmp_path / "empty"))
    with pytest.raises(OSError, match="does not exist"):
        open_images(with_data(options, tmp_path / "nowhere"))


def test_columns_of_other_names_are_listed(options):
    with pytest.raises(ValueError, match=r"has the columns image, text; --caption_column='caption' is not one"):
        open_images(TrainingConfig(**{**options, "caption_column": "caption"}))

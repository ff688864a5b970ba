import digits
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits.write_digits(tmp_path_factory.mktemp("digits"), seed=0)


def test_no_digit_is_in_both_parts_and_all_are_in_one(data):
    parts = [digits.read_digits(data / part) for part in ("train", "test")]
    assert [len(images) for images, _ in parts] == [1297, 500]
    names = [{path.name for path in (data / part).rglob("*.png")} for part in ("train", "test")]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 1797
    assert all(set(labels) == set(range(10)) for _, labels in parts)


@pytest.mark.full
def test_the_judge_knows_digits_and_is_not_fooled(data):
    train, test = (digits.read_digits(data / part) for part in ("train", "test"))
    judge = digits.Judge(train, epochs=6, seed=0)
    real = judge(*test)
    assert real.accuracy > 0.9
    noise = np.random.default_rng(0).integers(256, size=(500, 8, 8), dtype=np.uint8)
    fooled = judge([Image.fromarray(pixels) for pixels in noise], test[1])
    assert fooled.accuracy < 0.25
    assert fooled.frechet_distance > 5 * real.frechet_distance
    one = judge([test[0][0]] * 500, test[1])
    assert one.inception_score < 1.01 < real.inception_score


def test_in_turn_shows_every_digit():
    images = [Image.new("L", (8, 8), label) for label in (1, 0, *range(10))]
    shown = digits.in_turn(images, [1, 0, *range(10)])
    assert [image.getpixel((0, 0)) for image in shown] == list(range(10))


@pytest.mark.full
def test_it_trains_paints_judges_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "CHAIN_STEPS", 8)
    sizes = digits.Sizes(steps=2, batch_size=4, samples=100, num_inference_steps=2, classifier_epochs=1)
    rows = digits.main(tmp_path, sizes=sizes)
    table = capsys.readouterr().out
    for name, row in rows.items():
        assert f"{name:28} {row.n:5} {row.accuracy:8.3f}" in table
    assert [row.n for row in rows.values()] == [500, 100, 100]
    for name in ("digits.png", "noising.png", "denoising.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 9 * digits.CELL
    folders = {arm.folder: arm.rescale_betas_zero_snr for arm in digits.ARMS}
    for folder, zero_snr in folders.items():
        scheduler = digits.ClassConditionalPipeline.from_pretrained(tmp_path / folder).scheduler
        assert (scheduler.alphas_cumprod[-1] == 0) == zero_snr


@pytest.mark.slow
def test_the_digits_are_what_the_readme_says(tmp_path):
    torch.set_num_threads(2)
    rows = digits.main(tmp_path)
    real, ours, stock = rows.values()
    assert ours.accuracy >= 0.98
    assert abs(ours.inception_score / real.inception_score - 1) < 0.05
    assert ours.frechet_distance < min(real.frechet_distance, stock.frechet_distance)

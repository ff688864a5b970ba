import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from zsnr_diffusers.evaluation import ClassifierFeatures, image_features, train_classifier
from zsnr_diffusers.utils.hashing import file_sha256


def halves(n, channels=1, size=8, seed=0):
    """Noise that is brighter to the left (class 0) or to the right (class 1)."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = torch.randint(100, (n, channels, size, size), generator=draw)
    images[labels == 0, :, :, : size // 2] += 100
    images[labels == 1, :, :, size // 2 :] += 100
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    return path, train_classifier(*halves(512), path, "halves", epochs=4, batch_size=32)


def test_it_learns_what_it_is_shown(trained):
    path, sha256 = trained
    images, labels = halves(200, seed=1)
    found = image_features(ClassifierFeatures(path, sha256), images.expand(-1, 3, -1, -1))
    assert found.features.shape == (200, 64)
    assert found.logits.shape == (200, 2)
    assert (found.logits.argmax(1) == labels.numpy()).mean() > 0.95


def test_it_is_plain_convolutions(trained):
    path, _ = trained
    images = halves(5, seed=2)[0].expand(-1, 3, -1, -1)
    tensors = load_file(path)
    x = images[:, :1].float() / 127.5 - 1
    for i, stride in enumerate((1, 2, 2, 2)):
        layer = torch.nn.Conv2d(x.shape[1], len(tensors[f"conv.{i}.weight"]), 3, stride, 1)
        layer.load_state_dict({k: tensors[f"conv.{i}.{k}"] for k in ("weight", "bias")})
        x = layer(x).relu()
    features = (x.flatten(1) @ tensors["features.weight"].T + tensors["features.bias"]).relu()
    found, logits = ClassifierFeatures(path)(images)
    torch.testing.assert_close(found, features.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, F.linear(found, tensors["logits.weight"], tensors["logits.bias"]))


def test_same_seed_same_file(trained, tmp_path):
    _, sha256 = trained
    again = train_classifier(*halves(512), tmp_path / "again.safetensors", "halves", epochs=4, batch_size=32)
    other = train_classifier(*halves(64), tmp_path / "other.safetensors", "halves", epochs=1, seed=1, batch_size=32)
    assert again == sha256 == file_sha256(tmp_path / "again.safetensors")
    assert other != sha256


def test_images_of_another_size_are_brought_to_its_own(trained):
    network = ClassifierFeatures(trained[0])
    assert (network.size, network.origin.resize) == (8, "Pillow bicubic to 8")
    images, labels = halves(50, seed=3)
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    assert (network(large)[1].argmax(1) == labels).float().mean() > 0.9


def test_color_counts_where_it_was_trained_on_color(tmp_path):
    path = tmp_path / "color.safetensors"
    train_classifier(*halves(64, channels=3), path, "color", epochs=1, batch_size=32)
    images = halves(4, channels=3, seed=1)[0]
    network = ClassifierFeatures(path)
    assert not np.allclose(network(images)[0], network(images.flip(1))[0])


def test_another_hash_is_refused(trained):
    with pytest.raises(ValueError, match=r"expected 00ff; download the file again"):
        ClassifierFeatures(trained[0], "00ff")


def test_other_files_are_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError):
        ClassifierFeatures(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an image classifier"):
        ClassifierFeatures(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(trained[0].read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        ClassifierFeatures(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), "expected uint8 images"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), "expected uint8 images"),
        (torch.zeros(4, 1, 8, 6, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), "expected uint8 images"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), "a label per image"),
    ],
)
def test_bad_training_sets_are_refused(images, labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, tmp_path / "c.safetensors", "bad")
    assert not list(tmp_path.iterdir())

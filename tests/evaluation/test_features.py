import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import TinyInception, save_scripted, sha256, tiny_dinov2, tiny_inception
from torch import nn
from transformers import ViTConfig, ViTModel

from zsnr_diffusers.evaluation import INCEPTION_SHA256, CustomFeatures, DinoV2Features, InceptionFeatures
from zsnr_diffusers.utils.hashing import state_sha256


def random_images(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    module = tiny_inception()
    return module, save_scripted(module, tmp_path_factory.mktemp("inception") / "tiny.pt")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    model, folder = tiny_dinov2(), tmp_path_factory.mktemp("dino") / "tiny-dino"
    model.save_pretrained(folder)
    return model, folder


# The 2015 Inception network


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 3, 299, 299), (1, 3, 40, 24)])
def test_inception_gives_what_the_file_itself_does(inception, shape):
    module, path = inception
    images = random_images(*shape)
    features, logits = InceptionFeatures(path, sha256(path))(images)
    with torch.no_grad():
        expected, probabilities = module(images, return_features=True), module(images, no_output_bias=True)
    # The two resizes agree to float32 positions, 1e-3 of 255.
    assert torch.allclose(features, expected, atol=1e-4)
    assert torch.allclose(logits.softmax(1), probabilities, atol=1e-4)
    assert not torch.allclose(logits.softmax(1), module(images), atol=1e-2)  # the bias would show
    assert not features.requires_grad


def test_inception_says_what_it_is(inception):
    _, path = inception
    network = InceptionFeatures(path, sha256=None)
    assert network.size == 299
    assert network.origin.sha256 == sha256(path)
    assert "TensorFlow 1 bilinear to 299" in str(network.origin)
    assert InceptionFeatures(path, sha256(path).upper()).origin == network.origin


def test_file_saved_while_training_is_evaluated(tmp_path):
    training = save_scripted(TinyInception().train(), tmp_path / "training.pt")
    images = random_images(3, 3, 32, 32)
    network = InceptionFeatures(training, sha256=None)
    assert torch.allclose(network(images)[0][:1], network(images[:1])[0], atol=1e-5)  # no statistics of the batch


def test_wrong_hash_is_refused_before_anything_is_loaded(inception, tmp_path):
    _, path = inception
    with pytest.raises(ValueError, match=rf"tiny\.pt.*{sha256(path)}, expected {INCEPTION_SHA256}.*download"):
        InceptionFeatures(path)
    (tmp_path / "a.pt").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="expected 00"):
        InceptionFeatures(tmp_path / "a.pt", "00")


def test_wrong_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a network")
    torch.save(TinyInception().state_dict(), tmp_path / "weights.pth")
    for name in ("a.pt", "weights.pth"):
        with pytest.raises(ValueError, match=rf"{name}.*not a TorchScript file.*use inception-2015-12-05\.pt"):
            InceptionFeatures(tmp_path / name, sha256=None)
    save_scripted(nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"linear\.pt.*no modules `layers` and `output`"):
        InceptionFeatures(tmp_path / "linear.pt", sha256=None)
    with pytest.raises(FileNotFoundError):
        InceptionFeatures(tmp_path / "none.pt")


# DINOv2


def test_dinov2_by_hand(dinov2):
    """Pillow's bicubic, ImageNet's statistics, the class token after the last normalisation."""
    model, folder = dinov2
    images = random_images(2, 3, 30, 50)
    features, logits = DinoV2Features(folder)(images)
    assert logits is None
    assert features.shape == (2, 16)
    for image, found in zip(images, features, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        values = (np.asarray(picture) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            hidden = model(torch.from_numpy(values).float().permute(2, 0, 1)[None]).last_hidden_state
        assert torch.allclose(found, hidden[0, 0], atol=1e-5)


def test_dinov2_of_its_own_size_is_not_resized(dinov2):
    network = DinoV2Features(str(dinov2[1]), size=56)
    images = random_images(2, 3, 56, 56)
    assert torch.allclose(network(images)[0], network(images.clone())[0])
    assert network.size == 56
    assert network.origin.resize == "Pillow bicubic to 56"
    assert network.origin.network == "dinov2 tiny-dino"
    assert network.origin.sha256 == sha256(dinov2[1] / "model.safetensors")


def test_convolutions_are_exact_meanwhile(dinov2, monkeypatch):
    """A GPU would round them to 10 bits; what the rest of the program may do is left as it was."""
    network, seen = DinoV2Features(dinov2[1], size=56), []
    network._network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        network(random_images(1, 3, 56, 56))
        assert torch.backends.cudnn.allow_tf32 == before
    assert seen == [False, False]


def test_dinov2_of_another_hash_size_or_kind(dinov2, tmp_path):
    folder = dinov2[1]
    weights = sha256(folder / "model.safetensors")
    assert DinoV2Features(folder, weights).origin.sha256 == weights
    with pytest.raises(ValueError, match=rf"tiny-dino.*{weights}, expected 00"):
        DinoV2Features(folder, "00")
    with pytest.raises(ValueError, match="size 60 is not a multiple of the patch size 14"):
        DinoV2Features(folder, size=60)
    with pytest.raises(OSError, match="none"):
        DinoV2Features(tmp_path / "none", local_files_only=True)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'vit' model"):
        DinoV2Features(tmp_path / "vit")


def test_dinov2_without_all_its_weights(dinov2, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(dinov2[1] / "model.safetensors")
    gone = next(name for name in sorted(weights) if name.endswith("layernorm.weight"))
    del weights[gone]
    (tmp_path / "config.json").write_bytes((dinov2[1] / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*layernorm\.weight.* \(1 in total\)"):
        DinoV2Features(tmp_path)


# Networks of one's own


def test_any_function_is_a_network():
    def means(images):
        return images.float().mean((2, 3))

    network = CustomFeatures(means, "means", resize="area to 1", size=1)
    images = random_images(4, 3, 5, 5)
    features, logits = network(images)
    assert torch.equal(features, means(images))
    assert logits is None
    assert network.origin.sha256 == ""
    both = CustomFeatures(lambda images: (means(images), means(images) * 2), "both", sha256="12")
    assert torch.equal(both(images)[1], means(images) * 2)
    assert both.origin.sha256 == "12"


def test_hash_of_a_module_is_that_of_its_values():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    before = state_sha256(module)
    assert CustomFeatures(module, "tiny").origin.sha256 == before
    assert state_sha256(nn.Sequential(*module)) == before
    with torch.no_grad():
        module[0].bias[0] += 1e-6
    assert state_sha256(module) != before

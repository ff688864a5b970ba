"""The presets are the network of Ho et al. 2020: against `ddpm_network`, with the same random weights in both."""

import math
import re

import pytest
import torch
from ddpm_network import Network
from diffusers import UNet2DModel
from tiny_pipelines import seeded, zero_snr_scheduler
from torch import nn

from zsnr_diffusers import ClassConditionalPipeline, build_unet
from zsnr_diffusers.unet import PRESETS

LSUN = {"ch_mult": (1, 1, 2, 2, 4, 4), "resolution": 256, "attn_resolutions": {16}}
PAPER = {
    "ddpm-cifar10": {"ch": 128, "ch_mult": (1, 2, 2, 2), "resolution": 32, "attn_resolutions": {16}},
    "ddpm-lsun": {"ch": 128, **LSUN},
    "ddpm-celebahq": {"ch": 128, **LSUN},
    "ddpm-lsun-large": {"ch": 192, **LSUN},
    "small-8": {"ch": 32, "ch_mult": (1, 2), "resolution": 8, "attn_resolutions": {4}, "groups": 8},
    "small-16": {"ch": 32, "ch_mult": (1, 2, 2), "resolution": 16, "attn_resolutions": {8}, "groups": 8},
    "small-32": {"ch": 32, "ch_mult": (1, 2, 2, 2), "resolution": 32, "attn_resolutions": {16}, "groups": 8},
}
"""What the paper says, in the terms of its own code."""

PARAMETERS = {
    "ddpm-cifar10": 35_746_307,
    "ddpm-lsun": 113_673_219,
    "ddpm-celebahq": 113_673_219,
    "ddpm-lsun-large": 255_677_955,
    "small-8": 1_002_883,
    "small-16": 1_624_323,
    "small-32": 2_245_763,
}

TOLERANCE = 1e-5
"""Relative; float32 in another order of operations leaves some 1e-6."""


@pytest.fixture(autouse=True)
def seed():
    """First weights come from the global generator; what other tests draw from it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def deviation(a, b):
    return ((a - b).norm() / b.norm()).item()


def on_meta(name, *args, **changes):
    """Without memory or random numbers."""
    with torch.device("meta"):
        return build_unet(name, *args, **changes)


def randomised(name, *args, **changes):
    """The network with weights that hide nothing: no part is near zero, and no bias or norm is what it was.

    Only the first convolution is quiet, so that epsilon matters in the first normalisation.
    """
    unet = on_meta(name, *args, **changes).to_empty(device="cpu").eval()
    generator = seeded()
    with torch.no_grad():
        for key, value in unet.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5, generator=generator)
            else:
                value.normal_(std=0.1, generator=generator).add_("norm" in key and key.endswith("weight"))
        for value in unet.conv_in.parameters():
            value.mul_(1e-2)
    return unet


RENAMED = [
    (r"time_embedding\.linear_1", "time_a"),
    (r"time_embedding\.linear_2", "time_b"),
    (r"class_embedding", "labels"),
    (r"conv_in", "first"),
    (r"conv_norm_out", "last_norm"),
    (r"conv_out", "last"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.\3.residual"),
    (r"(down|up)_blocks\.(\d)\.attentions\.(\d)", r"\1.\2.\3.attention"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"shrink.\1"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", r"grow.\1"),
    (r"(norm1\.|conv1\.)", lambda found: {"norm1.": "norm_a.", "conv1.": "conv_a."}[found[1]]),
    (r"(norm2\.|conv2\.)", lambda found: {"norm2.": "norm_b.", "conv2.": "conv_b."}[found[1]]),
    (r"time_emb_proj", "time"),
    (r"conv_shortcut", "shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "out"),
    (r"to_([qkv])", r"\1"),
    (r"(norm\w*)\.weight", r"\1.scale"),
    (r"(norm\w*)\.bias", r"\1.shift"),
]


def paper_network(name, unet, **changes):
    """The paper's network around the same weights; loading is strict, so each has its place in both."""
    with torch.device("meta"):
        network = Network(**{**PAPER[name], **changes})
    state = {}
    for key, value in unet.state_dict().items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        state[key] = value
    network.load_state_dict(state, assign=True)
    return network.eval()


def noise(*shape):
    return torch.randn(*shape, generator=seeded(1))


# The same function as the paper's network


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [
        ("ddpm-cifar10", 32, 2),
        ("ddpm-lsun", 64, 1),  # attention stays at its level, so a smaller image shows the same
        ("ddpm-lsun-large", 64, 1),
        ("small-8", 8, 4),
        ("small-16", 16, 4),
        ("small-32", 32, 4),
    ],
)
@torch.no_grad()
def test_equals_the_papers_network(name, size, batch):
    unet = randomised(name)
    x, t = noise(batch, 3, size, size), torch.tensor([999, 1, 500, 0])[:batch]
    expected = paper_network(name, unet)(x, t)
    assert 0.1 < expected.std() < 10
    assert deviation(unet(x, t).sample, expected) < TOLERANCE


@torch.no_grad()
def test_classes_are_added_to_the_time():
    unet = randomised("small-8", 10, in_channels=1, out_channels=1)
    x, t, labels = noise(3, 1, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 9, 10])
    network = paper_network("small-8", unet, channels=1, classes=11)
    assert deviation(unet(x, t, labels).sample, network(x, t, labels)) < TOLERANCE
    assert deviation(unet(x, t, labels.flip(0)).sample, network(x, t, labels)) > 100 * TOLERANCE


@torch.no_grad()
def test_dropout_where_the_paper_has_it(monkeypatch):
    def dropout(x, p, training, inplace=False):
        """Torch's own draws in the order of memory, which is another in the two networks."""
        return x * (torch.rand(x.shape) >= p) / (1 - p) if p and training else x

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    unet = randomised("small-8").train()
    network = paper_network("small-8", unet, dropout=0.1).train()
    x, t = noise(4, 3, 8, 8), torch.tensor([3, 500, 999, 0])
    outputs = []
    for model in (unet, network):
        torch.manual_seed(0)
        outputs.append(model(x, t))
    assert deviation(outputs[0].sample, outputs[1]) < TOLERANCE
    assert deviation(unet.eval()(x, t).sample, outputs[1]) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def cifar10():
    """(network, x, t, what the paper's network says)"""
    unet = randomised("ddpm-cifar10")
    x, t = noise(1, 3, 32, 32), torch.tensor([400])
    with torch.no_grad():
        return unet, x, t, paper_network("ddpm-cifar10", unet)(x, t)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        {"attention_head_dim": 8},
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"norm_eps": 1e-5},
        {"norm_num_groups": 16},
        {"attn_norm_num_groups": 16},
        {"act_fn": "gelu"},
        {"mid_block_scale_factor": 2**0.5},
        {"center_input_sample": True},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_each_setting_is_seen(cifar10, change):
    """All of these keep the names and shapes of the weights, so nothing but the numbers would tell."""
    unet, x, t, expected = cifar10
    changed = on_meta("ddpm-cifar10", **change).eval()
    changed.load_state_dict(unet.state_dict(), assign=True)
    assert deviation(changed(x, t).sample, expected) > 100 * TOLERANCE


# Sizes


def test_number_of_parameters():
    assert set(PARAMETERS) == set(PAPER) == set(PRESETS)
    for name, expected in PARAMETERS.items():
        assert sum(value.numel() for value in on_meta(name).parameters()) == expected


def test_dropout_and_size_are_the_papers():
    assert {name: preset["dropout"] for name, preset in PRESETS.items() if name.startswith("ddpm")} == {
        "ddpm-cifar10": 0.1,
        "ddpm-lsun": 0.0,
        "ddpm-celebahq": 0.0,
        "ddpm-lsun-large": 0.0,
    }
    assert {name: preset["sample_size"] for name, preset in PRESETS.items()} == {
        name: paper["resolution"] for name, paper in PAPER.items()
    }


def test_changes():
    unet = on_meta("ddpm-lsun", 5, sample_size=(64, 96), in_channels=1, out_channels=2, dropout=0.2)
    assert type(unet) is UNet2DModel
    assert unet.config.sample_size == (64, 96)
    assert (unet.config.in_channels, unet.config.out_channels) == (1, 2)
    assert unet.down_blocks[0].resnets[0].dropout.p == 0.2
    assert unet.config.num_class_embeds == 6
    assert on_meta("small-8").config.num_class_embeds is None
    assert PRESETS["ddpm-lsun"]["dropout"] == 0.0


# First weights


@pytest.mark.full
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_says_zero_at_first(name):
    x = noise(1, 3, 32, 32)
    output = build_unet(name).eval()(x, 500).sample
    assert 0 < output.abs().max() < 1e-4


def fans(weight):
    receptive = weight[0, 0].numel()
    return receptive * weight.shape[1], receptive * weight.shape[0]


@pytest.mark.parametrize("name", ["ddpm-cifar10", "small-8", "small-16", "small-32"])
def test_first_weights(name):
    """Uniform to sqrt(3 scale / mean fan): `variance_scaling(scale, mode="fan_avg", distribution="uniform")`."""
    unet = build_unet(name, 10)
    quiet = []
    for key, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
            weight = module.weight
            bound = math.sqrt(6 / sum(fans(weight)))
            if weight.abs().max() < 1e-3 * bound:
                quiet.append(key)
                bound *= 1e-5
            many = weight.numel()  # 5 standard errors of a uniform variable's mean, std and largest value
            assert bound * (1 - 20 / many) < weight.abs().max() <= bound * (1 + 1e-6)
            assert abs(weight.mean()) < 5 * bound / math.sqrt(3 * many)
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(5 * many))
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    blocks = [key for key, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    attention = [key for key, module in unet.named_modules() if type(module).__name__ == "Attention"]
    levels = len(PRESETS[name]["block_out_channels"])
    assert (len(blocks), len(attention)) == (5 * levels + 2, 6)
    expected = [f"{key}.conv2" for key in blocks] + [f"{key}.to_out.0" for key in attention] + ["conv_out"]
    assert sorted(quiet) == sorted(expected)


def test_the_global_generator_decides():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_unet("small-8", 3).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])
    assert not torch.equal(states[0]["class_embedding.weight"], states[2]["class_embedding.weight"])


@pytest.mark.parametrize("name", ["ddpm-cifar10", "small-8"])
@torch.no_grad()
def test_classes_are_of_the_size_of_the_time(name):
    unet = build_unet(name, 100)
    t = torch.arange(0, 1000, 9)
    time = unet.time_embedding(unet.time_proj(t)).square().mean().sqrt().item()
    classes = unet.class_embedding.weight.square().mean(dim=1).sqrt()
    # one draw of the dense layers moves the time's by 3 % at 32 channels
    assert classes.mean().item() == pytest.approx(time, rel=0.1)
    assert (classes / time).min() > 0.7
    assert (classes / time).max() < 1.3
    assert classes[100] > 0  # no class is one of them


# In use


@torch.no_grad()
def test_no_class_is_the_last():
    unet = randomised("small-8", 3, in_channels=1, out_channels=1)
    assert unet.class_embedding.num_embeddings == 4
    pipe = ClassConditionalPipeline(unet, zero_snr_scheduler())
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "output_type": "latent"}
    images = pipe([0, 1, 2], guidance_scale=2.0, generator=seeded(), **kwargs).images
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    none = pipe(generator=seeded(), **kwargs).images
    unet.class_embedding.weight[:3] = torch.nan
    assert torch.equal(pipe(generator=seeded(), **kwargs).images, none)
    with pytest.raises(ValueError, match="0 to 2, and 3 for no class"):
        pipe([4])


@pytest.mark.parametrize("classes", [None, 3])
@torch.no_grad()
def test_saved_and_loaded_by_diffusers(classes, tmp_path):
    unet = randomised("small-16", classes)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    # None, which is one head, must not come back as UNet2DModel's 8
    assert loaded.config.attention_head_dim is None
    x, labels = noise(2, 3, 16, 16), None if classes is None else torch.tensor([0, 3])
    assert torch.equal(loaded(x, 400, labels).sample, unet(x, 400, labels).sample)


def test_learns():
    """From weights near zero: the first steps reach every layer."""
    unet = build_unet("small-8", 2, dropout=0.0)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    x, t, labels = noise(8, 3, 8, 8), torch.arange(0, 1000, 125), torch.arange(8) % 3
    losses = []
    for _ in range(15):
        loss = (unet(x, t, labels).sample - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not [key for key, value in unet.state_dict().items() if torch.equal(value, before[key])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ddpm"}, r"name='ddpm' is not a preset; choose one of ddpm-cifar10, ddpm-lsun, .*small-32"),
        ({"name": "small-8", "class_labels": 0}, r"class_labels=0 must be at least 1; omit it"),
        ({"name": "small-8", "num_class_embeds": 3}, r"num_class_embeds follows from class_labels"),
        ({"name": "ddpm-cifar10", "sample_size": 28}, r"sample_size=28 must be a multiple of 8 for 4 levels"),
        ({"name": "ddpm-lsun", "sample_size": 16}, r"sample_size=16 must be a multiple of 32 for 6 levels"),
        ({"name": "small-8", "sample_size": (8, 9)}, r"sample_size=\(8, 9\) must be a multiple of 2 for 2 levels"),
        ({"name": "small-8", "sample_size": 0}, r"sample_size=0 must be a multiple of 2"),
    ],
)
def test_refused_before_anything_is_built(arguments, message, monkeypatch):
    monkeypatch.setattr("diffusers.UNet2DModel", None)
    with pytest.raises(ValueError, match=message):
        build_unet(**arguments)

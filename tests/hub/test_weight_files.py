import json
import logging

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from published_models import networks, published, published_file, published_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_pipelines.published import BASES, write_published
from torch import nn

from zsnr_diffusers import load_pipeline, save_pipeline
from zsnr_diffusers.hub.files import find_only_variant
from zsnr_diffusers.hub.weight_files import (
    DTYPE_ARGUMENT,
    copy_in_float32,
    prepare_for_safetensors,
    set_config_dtype_to_float32,
    weight_variants,
    with_single_dtype,
)

# -- what is saved


def test_tensors_of_any_layout_that_share_memory_are_saved_and_read_back(tmp_path):
    shared, image = torch.arange(6.0), torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    tensors = {
        "map of one": shared,
        "map of another": shared,
        "a view": shared[2:4],
        "turned": torch.randn(3, 5).T,
        "channels last": image,
        "repeated": torch.ones(1, 4).expand(3, 4),
        "every other": torch.arange(10)[::2],
        "trained": nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
        "a number": torch.tensor(3),
    }
    save_file(prepare_for_safetensors(tensors), tmp_path / "tensors.safetensors")
    back = load_file(tmp_path / "tensors.safetensors")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    assert back.keys() == tensors.keys()


@pytest.mark.full
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_a_pipeline_in_channels_last_order_is_saved(layout, name, tmp_path):
    pipe = published_pipeline("1.5")
    pipe.unet.to(memory_format=layout)
    pipe.vae.to(memory_format=layout)
    path = save_pipeline(pipe, tmp_path / name)
    back = load_pipeline(path, prediction_type="epsilon", **({"config": published("1.5")} if path.is_file() else {}))
    for part, network in networks(pipe).items():
        for key, value in network.state_dict().items():
            assert torch.equal(networks(back)[part].state_dict()[key], value)


# -- what is loaded


@pytest.mark.full
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "fp16"])
def test_everything_is_loaded_in_one_dtype(name, form):
    pipe = load_pipeline(published(name, form))
    assert {part.dtype for part in networks(pipe).values()} == {torch.float32}
    assert {value.dtype for part in networks(pipe).values() for value in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_another_dtype_by_either_name(argument):
    pipe = load_pipeline(published("xl"), **{argument: torch.bfloat16})
    assert {part.dtype for part in networks(pipe).values()} == {torch.bfloat16}


def test_the_argument_is_what_the_installed_diffusers_calls_it(recwarn):
    diffusers.DDPMPipeline  # noqa: B018  # imports warn of themselves
    recwarn.clear()
    unet = UNet2DConditionModel.from_pretrained(published("1.5"), subfolder="unet", **with_single_dtype({}))
    assert unet.dtype == torch.float32
    assert [str(one.message) for one in recwarn if "torch_dtype" in str(one.message)] == []


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_weights_in_full_precision_are_not_rounded_to_what_a_config_asks_for(place, part):
    """SDXL's text encoders ask for float16, and its files may hold float32."""
    if place == "folder":
        pipe = load_pipeline(published("xl"))
    else:
        pipe = load_pipeline(published_file("xl"), config=published("xl"))
    weights, network = load_file(published("xl") / part / "model.safetensors"), getattr(pipe, part)
    tokens = weights["text_model.embeddings.token_embedding.weight"]
    assert not torch.equal(tokens.half().float(), tokens)
    assert torch.equal(network.get_input_embeddings().weight, tokens)
    found = [value for key, value in network.state_dict().items() if key.endswith("layers.1.mlp.fc1.weight")]
    assert torch.equal(found[0], weights["text_model.encoder.layers.1.mlp.fc1.weight"])


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_file_is_loaded_in_any_dtype_without_a_warning_of_nothing(dtype, caplog):
    logger = logging.getLogger("diffusers.models.modeling_utils")
    filters = [*logger.filters]
    logger.addHandler(caplog.handler)
    try:
        pipe = load_pipeline(
            published_file("1.5"), config=published("1.5"), **{} if dtype is None else {"dtype": dtype}
        )
        assert not [record for record in caplog.records if "kept in float32" in record.getMessage()]
    finally:
        logger.removeHandler(caplog.handler)
    assert logger.filters == filters
    assert {part.dtype for part in networks(pipe).values()} == {dtype or torch.float32}


# -- variants


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["unet/diffusion_pytorch_model.safetensors", "unet/config.json"], {None}),
        (["unet/diffusion_pytorch_model.fp16.safetensors"], {"fp16"}),
        (["model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"], {None, "fp16"}),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.bin"], {"non_ema", "fp16"}),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], {None}),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], {"fp16"}),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], {"fp16"}),
        (["diffusion_pytorch_model.safetensors.index.fp16.json", "README.md", "model.onnx"], set()),
    ],
)
def test_variants_by_the_names_of_files(names, found):
    assert weight_variants(names) == found


def test_the_only_variant_is_taken_and_none_of_several(tmp_path):
    assert find_only_variant(published("1.5", "fp16"), {}) == "fp16"
    assert find_only_variant(published("1.5"), {}) is None
    both = write_published("1.5", tmp_path, dtype=torch.float16, variant="fp16")
    assert find_only_variant(both, {}) == "fp16"
    write_published("1.5", tmp_path)
    assert find_only_variant(both, {}) is None


def test_the_only_variant_of_a_repo_also_from_the_cache(hub):
    places = hub({"acme/half": published("1.5", "fp16")})
    assert load_pipeline("acme/half", **places).unet.dtype == torch.float32
    hub({})  # which has nothing: what is in the cache is enough
    assert find_only_variant("acme/half", places) == "fp16"


# -- copies


def whole(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def test_float32_is_copied_byte_for_byte(tmp_path):
    source = published("1.5") / "text_encoder"
    copy_in_float32(source, tmp_path / "copy", None)
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(
        file.name for file in source.iterdir()
    )
    for file in source.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_tokenizers_are_copied_with_all_their_files(tmp_path):
    source = published("1.5") / "tokenizer"
    copy_in_float32(source, tmp_path / "copy", "fp16")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()
    }


@pytest.mark.full
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("shape", ["one file", "shards", "pickled"])
def test_half_precision_is_copied_as_float32_under_plain_names(variant, shape, tmp_path):
    source, unet = tmp_path / "source", published_pipeline("1.5").unet.half()
    size = {"max_shard_size": "1MB"} if shape == "shards" else {}
    unet.save_pretrained(source, variant=variant, safe_serialization=shape != "pickled", **size)
    copy_in_float32(source, tmp_path / "copy", variant)
    back = UNet2DConditionModel.from_pretrained(tmp_path / "copy", use_safetensors=True)
    expected = unet.float().state_dict()
    assert {value.dtype for value in whole(tmp_path / "copy").values()} == {torch.float32}
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())


def test_weights_of_other_variants_and_formats_are_left_out(tmp_path):
    source = tmp_path / "source"
    network = published_pipeline("2.1").vae
    network.save_pretrained(source)
    network.half().save_pretrained(source, variant="fp16")
    network.save_pretrained(source, safe_serialization=False)
    (source / "model.onnx").write_bytes(b"onnx")
    copy_in_float32(source, tmp_path / "copy", None)
    found = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert found == ["config.json", "diffusion_pytorch_model.safetensors"]


# -- what is saved opens in one dtype, and elsewhere


@pytest.mark.full
@pytest.mark.parametrize("name", ["1.5", "xl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_saved_pipeline_opens_in_float32_without_a_dtype(name, dtype, tmp_path):
    pipe = published_pipeline(name).to(dtype)
    save_pipeline(pipe, tmp_path / "saved")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert {part.dtype for part in networks(opened).values()} == {torch.float32}
    for part, network in networks(pipe).items():
        for key, value in network.state_dict().items():
            assert torch.equal(
                networks(opened)[part].state_dict()[key], value.float() if value.is_floating_point() else value
            )


@pytest.mark.full
def test_text_encoders_from_a_file_are_saved_by_their_published_names(tmp_path):
    """transformers 4 finds no others, and goes on with random weights."""
    from published_models import published_file

    pipe = load_pipeline(published_file("xl"), config=published("xl"))
    save_pipeline(pipe, tmp_path / "saved")
    for part in ("text_encoder", "text_encoder_2"):
        with safe_open(tmp_path / "saved" / part / "model.safetensors", "pt") as file:
            assert {key.partition(".")[0] for key in file.keys()} <= {"text_model", "text_projection"}  # noqa: SIM118
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved", **{DTYPE_ARGUMENT: torch.float32})
        for key, value in getattr(pipe, part).state_dict().items():
            assert torch.equal(getattr(again, part).state_dict()[key], value)


@pytest.mark.parametrize("config", [{}, {"dtype": "float32"}, {"dtype": None}, {"hidden_size": 4}])
def test_a_config_that_asks_for_nothing_else_stays_as_it_is(config, tmp_path):
    file = tmp_path / "config.json"
    text = json.dumps(config)
    file.write_text(text)
    set_config_dtype_to_float32(file)
    assert file.read_text() == text
    set_config_dtype_to_float32(tmp_path / "none.json")

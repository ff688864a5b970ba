"""Names and shapes of original checkpoints; the way back is diffusers' own."""

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type
from peft import LoraConfig
from published_models import networks
from safetensors.torch import save_file
from small_pipelines.controlnet import controlnet
from small_pipelines.parts import projecting_text_encoder, text_encoder, unet
from tiny_adapters import needs_text_adapters
from tiny_checkpoints import KINDS, assert_same_weights, checkpoint, tiny_pipeline

from zsnr_diffusers.hub.layouts import SD_1, SD_2, SDXL, detect_layout
from zsnr_diffusers.hub.ldm_format import detect_pipeline_layout, original_checkpoint


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_every_weight_back(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "config")
    save_file(original_checkpoint(pipe), tmp_path / "model.safetensors")
    back = type(pipe).from_single_file(tmp_path / "model.safetensors", config=str(tmp_path / "config"))
    assert_same_weights(pipe, back)


# By hand, from the files that Stability AI and CompVis published, with the widths of the small models.
KNOWN = {
    "1": {
        "model.diffusion_model.time_embed.0.weight": [64, 16],
        "model.diffusion_model.input_blocks.3.0.op.weight": [16, 16, 3, 3],
        "model.diffusion_model.input_blocks.2.1.proj_in.weight": [16, 16, 1, 1],
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": [512, 64],
        "model.diffusion_model.middle_block.2.out_layers.3.bias": [64],
        "model.diffusion_model.output_blocks.2.1.conv.weight": [64, 64, 3, 3],
        "model.diffusion_model.output_blocks.5.2.conv.weight": [64, 64, 3, 3],
        "model.diffusion_model.output_blocks.8.2.conv.weight": [32, 32, 3, 3],
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": [16, 32, 1, 1],
        "first_stage_model.encoder.mid.attn_1.q.weight": [16, 16, 1, 1],
        "first_stage_model.decoder.up.3.upsample.conv.weight": [16, 16, 3, 3],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [8, 16, 1, 1],
        "first_stage_model.decoder.mid.block_2.norm1.weight": [16],
        "first_stage_model.quant_conv.weight": [8, 8, 1, 1],
        "cond_stage_model.transformer.text_model.encoder.layers.2.self_attn.q_proj.weight": [32, 32],
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [77, 32],
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 32],
    },
    "2": {
        "model.diffusion_model.input_blocks.2.1.proj_in.weight": [20, 20],
        "cond_stage_model.model.positional_embedding": [77, 32],
        "cond_stage_model.model.token_embedding.weight": [49408, 32],
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": [96, 32],
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": [96],
        "cond_stage_model.model.transformer.resblocks.10.mlp.c_fc.weight": [64, 32],
        "cond_stage_model.model.ln_final.weight": [32],
    },
    "xl": {
        "model.diffusion_model.label_emb.0.0.weight": [80, 96],
        "model.diffusion_model.middle_block.1.transformer_blocks.2.attn2.to_k.weight": [80, 80],
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": [32],
        "conditioner.embedders.1.model.text_projection": [48, 48],
        "conditioner.embedders.1.model.transformer.resblocks.10.mlp.c_proj.bias": [48],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_published_files(kind):
    weights = checkpoint(kind)
    assert {key: [*weights[key].shape] for key in KNOWN[kind]} == KNOWN[kind]


def test_the_projection_is_transposed_and_the_matrices_are_stacked_in_order():
    encoder, weights = tiny_pipeline("xl").text_encoder_2, checkpoint("xl")
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(weights[f"{prefix}text_projection"], encoder.text_projection.weight.T)
    attention = encoder.text_model.encoder.layers[3].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(weights[f"{prefix}transformer.resblocks.3.attn.in_proj_weight"], torch.cat(parts))


def test_diffusers_recognises_the_model():
    assert infer_diffusers_model_type(checkpoint("xl")) == "xl_base"
    assert infer_diffusers_model_type(checkpoint("1")) == "v1"
    assert CHECKPOINT_KEY_NAMES["v2"] in checkpoint("2")  # and 1024 wide, which this one is not


@pytest.mark.parametrize(("kind", "layout"), [("1", SD_1), ("2", SD_2), ("xl", SDXL)])
def test_layouts_are_told_apart(kind, layout):
    shapes = {key: [*tensor.shape] for key, tensor in checkpoint(kind).items()}
    assert detect_layout(shapes) is layout
    assert detect_layout({key: shape for key, shape in shapes.items() if key.startswith("model.")}) is layout
    assert detect_pipeline_layout(tiny_pipeline(kind)) is layout
    assert detect_layout({key: shape for key, shape in shapes.items() if not key.startswith("model.")}) is None
    another = {"1": "cond_stage_model.model.x", "2": "cond_stage_model.transformer.x", "xl": "cond_stage_model.x"}
    assert detect_layout({**shapes, another[kind]: [1]}) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    pipe = tiny_pipeline("2").to(dtype)
    assert {tensor.dtype for tensor in original_checkpoint(pipe).values()} == {dtype}


# What is refused


def test_weights_that_the_layout_has_no_place_for():
    pipe = tiny_pipeline("1")
    pipe.unet = unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match=r"'class_embedding.linear_1.weight' has no name"):
        original_checkpoint(pipe)
    pipe.unet = unet(layers_per_block=[1, 2])
    with pytest.raises(ValueError, match="has no name in an original checkpoint"):
        original_checkpoint(pipe)


def test_weights_that_diffusers_would_not_read_back():
    pipe = tiny_pipeline("2")  # its loader drops the last layer of the published encoder, the 24th
    pipe.text_encoder = text_encoder(hidden_act="gelu", num_hidden_layers=24)
    with pytest.raises(ValueError, match=r"could not read .*layers\.23.* of CLIPTextModel back"):
        original_checkpoint(pipe)
    pipe = tiny_pipeline("xl")
    pipe.text_encoder_2 = projecting_text_encoder(hidden_act="gelu", hidden_size=32)  # as wide as the other
    with pytest.raises(ValueError, match="by their width"):
        original_checkpoint(pipe)


def test_other_parts():
    pipe = tiny_pipeline("1")
    guided = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet(unet), requires_safety_checker=False
    )
    with pytest.raises(ValueError, match=r"controlnet: ControlNetModel\) cannot be saved as a single file"):
        original_checkpoint(guided)


@pytest.mark.parametrize("part", ["unet", pytest.param("text_encoder", marks=needs_text_adapters)])
def test_adapters_and_offloaded_weights(part):
    pipe = tiny_pipeline("1")
    networks(pipe)[part].add_adapter(LoraConfig(target_modules=["to_q", "q_proj"]))
    with pytest.raises(ValueError, match=r"belongs to an adapter: call pipe\.fuse_lora"):
        original_checkpoint(pipe)
    pipe = tiny_pipeline("1")
    networks(pipe)[part].to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        original_checkpoint(pipe)

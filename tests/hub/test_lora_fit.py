"""LoRA that fit a pipeline in part or not at all, or of which diffusers would leave something out."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny_adapters import adapted, add_adapter, assert_paints_alike, needs_text_adapters
from tiny_checkpoints import EPSILON, V, generate, sd_scheduler, tiny_pipeline

from zsnr_diffusers import ZeroSNRDDIMScheduler, load_lora, save_lora
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE

SAID = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a LoRA; do not change it."""
    return save_lora(adapted(target_modules=["to_k", "to_v"]), tmp_path_factory.mktemp("lora") / "dark")


@pytest.fixture
def write(saved, tmp_path):
    def write(name, change, metadata=SAID):
        save_file(change(load_file(saved / name)), tmp_path / "theirs.safetensors", metadata)
        return tmp_path / "theirs.safetensors"

    return write


def assert_refused(pipe, file, message, **told):
    """And nothing of the pipeline is another."""
    scheduler, cls = pipe.scheduler, type(pipe)
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    adapters, config = pipe.get_list_adapters(), dict(pipe.config)
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(pipe, file, **told)
    assert pipe.scheduler is scheduler
    assert type(pipe) is cls
    assert pipe.get_list_adapters() == adapters
    assert dict(pipe.config) == config
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in pipe.unet.state_dict().items())
    return str(caught.value)


def renamed(old, new):
    return lambda weights: {key.replace(old, new, 1): value for key, value in weights.items()}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (LORA_FILE, "unet.", "base_model.model.", "as peft's save_pretrained writes them"),
        (LORA_FILE, "unet.", "unet.base_model.model.", "as peft's save_pretrained writes them"),
        (LORA_FILE, "unet.", "diffusion_model.", "in ComfyUI's format"),
        (LORA_FILE, "unet.", "transformer.", "of a LoRA for a transformer"),
        (LORA_FILE, "unet.", "", "0 of its"),
        (LORA_FILE, "unet.", "model.", "0 of its"),
        (LORA_FILE, "blocks", "layers", "it was trained on another base"),
        (KOHYA_FILE, "lora_unet_", "lora_transformer_", "of a LoRA for a transformer"),
        (KOHYA_FILE, "lora_unet_", "lora_prior_unet_", "theirs.safetensors"),
    ],
)
def test_names_that_mean_nothing_to_a_pipeline_are_refused(name, old, new, message, write):
    assert_refused(tiny_pipeline("1"), write(name, renamed(old, new)), message)


def test_layers_that_are_left_out_are_named(write):
    def more(weights):
        layer = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn2.to_k"
        return weights | {f"{layer}.lora_A.weight": torch.ones(3, 8), f"{layer}.lora_B.weight": torch.ones(8, 3)}

    said = assert_refused(tiny_pipeline("1"), write(LORA_FILE, more), "would ignore the rest")
    assert "('unet.down_blocks.7.attentions.0.transformer_blocks.0.attn2.to_k')" in said


@needs_text_adapters
def test_a_part_that_the_pipeline_has_not_is_named(tmp_path):
    folder = save_lora(adapted(texts=True, target_modules=["to_k"]), tmp_path)
    pipe = tiny_pipeline("1")
    pipe.text_encoder = None
    for name in (LORA_FILE, KOHYA_FILE):
        assert "text_encoder.text_model.encoder" in assert_refused(pipe, folder / name, "would ignore the rest")


def test_another_adapter_stays_as_it_is(write):
    pipe = tiny_pipeline("1")
    add_adapter(pipe.unet, "mine", target_modules=["to_k", "to_q"])
    before = generate(pipe)
    assert_refused(pipe, write(LORA_FILE, renamed("unet.", "base_model.model.")), "peft")
    assert pipe.get_active_adapters() == ["mine"]
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize(
    "end",
    [
        *("dora_scale", "diff", "diff_b", "w_norm", "b_norm", "lokr_w1", "hada_w1_a", "oft_blocks", "oft_diag"),
        *("lora_mid.weight", "reg_alpha", "scale", "lora_up.bias", "on_input"),
    ],
)
def test_what_diffusers_would_leave_out_of_a_file_is_named(end, write):
    """Of one layer that has a LoRA too."""

    def more(weights):
        layer = next(key for key in sorted(weights) if key.endswith("lora_down.weight")).partition(".")[0]
        return weights | {f"{layer}.{end}": torch.ones(8, 1)}

    said = assert_refused(
        tiny_pipeline("1"), write(KOHYA_FILE, more), "contains more than diffusers applies of a LoRA"
    )
    assert f".{end}'" in said


def test_embeddings_that_were_trained_with_it_are_named(write):
    said = assert_refused(
        tiny_pipeline("1"), write(LORA_FILE, lambda all_: all_ | {"bundle_emb.x": torch.ones(2)}), "contains more than"
    )
    assert "'bundle_emb.x'" in said


# -- what a file and a pipeline say together


@pytest.mark.parametrize(
    "scheduler",
    [
        sd_scheduler(V, zero_snr=True),
        ZeroSNRDDIMScheduler.from_config(sd_scheduler(V).config),
        EulerDiscreteScheduler.from_config(sd_scheduler(V, zero_snr=True).config),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_epsilon_never_comes_to_a_schedule_of_zero_snr(scheduler, write):
    file = write(LORA_FILE, lambda weights: weights, {"modelspec.prediction_type": "epsilon"})
    assert_refused(tiny_pipeline("1", scheduler), file, "theirs.safetensors.*cannot be used at zero signal-to-noise")
    pipe = load_lora(tiny_pipeline("1", scheduler), file, rescale_betas_zero_snr=False)
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.rescale_betas_zero_snr) == (EPSILON, False)
    assert generate(pipe).isfinite().all()


def test_zero_snr_never_comes_to_an_epsilon_model(write):
    file = write(LORA_FILE, lambda weights: weights, None)
    broken = DDIMScheduler.from_config(sd_scheduler(EPSILON, zero_snr=True).config)
    assert_refused(tiny_pipeline("1", broken), file, "cannot be used at zero", prediction_type=EPSILON)


def test_what_fits_is_loaded_as_before(saved):
    assert_paints_alike(load_lora(tiny_pipeline("1"), saved), adapted(target_modules=["to_k", "to_v"]))

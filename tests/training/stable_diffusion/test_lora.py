"""LoRA and DoRA runs: what is trained, what is kept, what is shipped."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from child_processes import arguments, exit_code, start_ranks
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from training_runs import logged, same

import zsnr_diffusers.utils.extras as extras
from zsnr_diffusers import load_lora
from zsnr_diffusers.hub.lora_files import LORA_FILE
from zsnr_diffusers.training import TrainingConfig, main, network, train
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints
from zsnr_diffusers.training.checkpointing.fingerprint import compute_fingerprint
from zsnr_diffusers.training.data.dataset import to_model_range
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, create_dataloader
from zsnr_diffusers.training.parameters import (
    base_state_dict,
    cast_for_training,
    trainable_parameters,
    trainable_state_dict,
)
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask, output
from zsnr_diffusers.training.stable_diffusion.config import LORA_TARGETS

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

STEADY = [target for target in LORA_TARGETS if target != "time_emb_proj"]
"""Without what is added to a whole channel: in networks as small as these some channels are a group to themselves,
from which normalization takes that away again. Its gradient is rounding alone, which Adam blows up."""


@pytest.fixture
def options(options):
    return {**options, "lora_rank": 2, "lora_alpha": 3.0, "lr_scheduler": "constant"}


def run(options, **changes):
    """Run a configuration; the weights that it ships."""
    config = TrainingConfig(**{**options, **changes})
    train(config)
    return load_file(Path(config.output_dir, LORA_FILE))


def task_of(options, **changes):
    return StableDiffusionTask(TrainingConfig(**{**options, **changes}))


@pytest.fixture
def shipping(monkeypatch):
    """The pipelines that runs ship, as they are in memory."""
    pipes, save = [], output.save_lora_folder
    monkeypatch.setattr(
        output, "save_lora_folder", lambda base, pipe, *args: pipes.append(pipe) or save(base, pipe, *args)
    )
    return pipes


def last_checkpoint(options, name="unet"):
    return load_file(list_checkpoints(Path(options["output_dir"]))[-1] / f"{name}.safetensors")


# -- what is trained


@pytest.mark.full
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapter_alone_changes(options, base_folder, shipping, use_dora):
    before = trainable_state_dict(task_of(options, use_dora=use_dora).unet)
    run(options, use_dora=use_dora, ema_decay=0.0)
    unet, base = shipping[0].unet, DiffusionPipeline.from_pretrained(base_folder).unet
    assert same(base_state_dict(unet), base.state_dict())
    after = trainable_state_dict(unet)
    assert before.keys() == after.keys()
    assert all(("lora_A" in key) + ("lora_B" in key) + ("magnitude" in key) == 1 for key in after)
    assert not [key for key, value in after.items() if torch.equal(value, before[key])]


def test_an_untrained_adapter_changes_nothing(options, base_folder):
    unet, base = task_of(options, use_dora=True).unet, DiffusionPipeline.from_pretrained(base_folder).unet
    x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        # DoRA divides by the norm that it has multiplied with
        torch.testing.assert_close(unet(x_t, 500, text).sample, base(x_t, 500, text).sample, rtol=0, atol=1e-6)


def test_first_weights_are_of_the_seed_alone(options):
    first = trainable_state_dict(task_of(options).unet)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(first, trainable_state_dict(task_of(options).unet))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, trainable_state_dict(task_of(options, seed=1).unet))


@pytest.mark.full
@pytest.mark.parametrize("use_dora", [False, True])
def test_updates_are_those_of_a_plain_loop_of_torch_and_peft(options, base_folder, use_dora):
    options |= {"max_train_steps": 3, "train_batch_size": 4, "max_grad_norm": 0.1, "cache": "none"}
    # with a smaller one, Adam's steps of gradients near 0 are their signs, which rounding decides
    options |= {"use_dora": use_dora, "lora_target_modules": STEADY, "adam_epsilon": 1e-4}
    run(options, ema_decay=0.0)

    pipe, config = DiffusionPipeline.from_pretrained(base_folder), TrainingConfig(**options)
    unet, task = pipe.unet.requires_grad_(False), task_of(options)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=STEADY, use_dora=use_dora))
    parameters = {name: value for name, value in unet.named_parameters() if "lora" in name}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=1e-2, eps=1e-4)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Algorithm 1 of the paper
    for batch in create_dataloader(task.samples(range(10)), DistributedBatchSampler(config, range(3), 0, 1), config):
        alpha = root[batch["timestep"]].float().reshape(-1, 1, 1, 1)
        sigma = (1 - root[batch["timestep"]] ** 2).sqrt().float().reshape(-1, 1, 1, 1)
        with torch.no_grad():
            latents = pipe.vae.encode(to_model_range(batch["pixel_values"])).latent_dist
            x_0 = (latents.mean + latents.std * batch["posterior_noise"]) * pipe.vae.config.scaling_factor
            text = pipe.text_encoder(batch["input_ids"])[0]
        x_t, v = alpha * x_0 + sigma * batch["noise"], alpha * batch["noise"] - sigma * x_0
        F.mse_loss(unet(x_t, batch["timestep"], text).sample, v).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in last_checkpoint(options).items():
        # a hundredth of the learning rate, which is about what Adam's first steps are
        torch.testing.assert_close(value, parameters[name].detach(), rtol=0, atol=1e-5)


@pytest.mark.full
def test_training_lowers_the_loss_on_the_pictures_that_it_sees(options, base_folder):
    task = task_of(options)
    samples = task.samples(range(10))
    batch = task.encode(torch.utils.data.default_collate([samples[position] for position in range(64)]))

    def loss(unet):
        with torch.no_grad():
            x_0 = task.x_0(batch)
            level = task.schedule.noise_level(batch["timestep"], like=x_0)
            x_t = level.alpha * x_0 + level.sigma * batch["noise"]
            v = level.alpha * batch["noise"] - level.sigma * x_0
            return F.mse_loss(task.predict(unet, x_t, batch), v).item()

    changes = {"lora_rank": 8, "max_train_steps": 60, "learning_rate": 5e-3, "ema_decay": 0.0}
    run(options, **changes, train_batch_size=8, checkpointing_steps=60)
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    before = loss(pipe.unet)
    assert loss(load_lora(pipe, options["output_dir"]).unet) < 0.8 * before


# -- what is kept


@pytest.mark.slow  # the same is shown of the loop itself
@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(options, changes):
    whole = run(options, **changes)
    folder = Path(options["output_dir"])
    shutil.rmtree(folder / "checkpoint-000004")
    (folder / LORA_FILE).unlink()
    assert same(run(options, **changes, resume=True), whole)


def test_checkpoints_hold_the_adapter_alone(options):
    run(options)
    unet = task_of(options).unet
    adapter = trainable_parameters(unet)
    assert last_checkpoint(options).keys() == last_checkpoint(options, "ema").keys() == adapter.keys()
    kept = {name.rpartition(".")[0] for name in last_checkpoint(options, "optimizer")}
    assert kept == {f"unet.{name}" for name in adapter}


@pytest.mark.full
def test_the_average_is_what_is_shipped(options):
    shipped, averaged = run(options), last_checkpoint(options, "ema")
    assert not same(averaged, last_checkpoint(options))
    assert len(shipped) == len(averaged)
    for name, value in averaged.items():
        strength = 3 / 2 if "lora_B" in name else 1
        assert torch.equal(shipped[f"unet.{name.replace('.default', '')}"], value * strength)


Disk = namedtuple("Disk", "total used free")


@pytest.mark.full
def test_disk_space_is_that_of_the_adapter(options, monkeypatch):
    trained = trainable_parameters(task_of(options).unet).values()
    # It, its average and Adam's moments, with a number of steps for each tensor.
    size = 4 * 4 * sum(value.numel() for value in trained) + 4 * len(trained)
    for missing in (1, 0):
        free = 3 * size - missing  # two checkpoints and one on its way
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Disk(0, 0, free))
        if missing:
            with pytest.raises(ValueError, match="free some space"):
                run(options, cache="none")
        else:
            run(options, cache="none")


def test_the_base_is_known_by_the_same_fingerprint(options):
    lora, whole = task_of(options), task_of(options, lora_rank=None, lora_alpha=None)
    assert compute_fingerprint(lora, [0]) == compute_fingerprint(whole, [0])


# -- how it is computed


@pytest.mark.full
@pytest.mark.parametrize("use_dora", [False, True])
def test_half_of_the_memory_gives_the_same_numbers(options, monkeypatch, shipping, use_dora):
    """autocast rounds the weights of frozen products anyway."""
    options |= {"mixed_precision": "bf16", "use_dora": use_dora, "lora_target_modules": ATTENTION}
    options |= {"validation_prompts": ["snow"]}
    half = run(options)
    layers = dict(shipping[0].unet.named_modules())
    types = {type(layer).__name__: layer.weight.dtype for layer in layers.values() if hasattr(layer, "weight")}
    assert types["LayerNorm"] == types["GroupNorm"] == torch.float32
    assert types["Conv2d"] == torch.bfloat16
    query = layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert query.base_layer.weight.dtype == (torch.float32 if use_dora else torch.bfloat16)
    assert query.lora_A["default"].weight.dtype == query.lora_B["default"].weight.dtype == torch.float32
    monkeypatch.setattr(network, "cast_for_training", lambda unet, half, _: cast_for_training(unet, None))
    assert same(half, run(options, output_dir=options["output_dir"] + "-whole"))


def test_what_is_trained_as_a_whole_stays_float32():
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert {value.dtype for value in cast_for_training(network, torch.float16).parameters()} == {torch.float32}


@pytest.mark.slow  # the same is shown of the loop itself
def test_two_processes_checkpointing_and_accumulation_give_what_one_gives(options, tmp_path):
    options |= {"train_batch_size": 4, "report_to": "tensorboard", "lora_target_modules": STEADY}
    shipped = run(options)
    others = {**options, "output_dir": str(tmp_path / "two"), "train_batch_size": 1}
    others |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    ranks = start_ranks(others, tmp_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank0.log").read_text()
    losses = [[value for _, value in logged(folder)["loss"]] for folder in (tmp_path / "two", options["output_dir"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the sum over a batch in another order
    for name, value in load_file(tmp_path / "two" / LORA_FILE).items():
        # of some 4 x 1e-3 that four steps of Adam go
        torch.testing.assert_close(value, shipped[name], rtol=0, atol=1e-5)


# -- what is shipped


@pytest.mark.full
def test_it_paints_what_the_run_would_have_painted(options, base_folder, shipping):
    run(options, learning_rate=0.1, ema_decay=0.0, validation_prompts=["snow"])
    # a larger scale would amplify what the order of products rounds
    call = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}

    def generate(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("snow", generator=torch.Generator().manual_seed(0), **call).images

    base = DiffusionPipeline.from_pretrained(base_folder)
    base.scheduler = type(shipping[0].scheduler).from_config(shipping[0].scheduler.config)
    bare, image = generate(base), generate(shipping[0])
    assert load_lora(base, options["output_dir"]).scheduler.config.rescale_betas_zero_snr
    assert base.default_guidance_rescale == shipping[0].default_guidance_rescale == 0.7
    assert base.default_keep_low_frequencies == shipping[0].default_keep_low_frequencies == 4
    # the strength, 3 / 2, stands in the weights rather than behind the product
    torch.testing.assert_close(generate(base), image, rtol=0, atol=1e-5 * image.abs().max().item())
    assert (bare - image).abs().max() > 0.1
    assert Path(options["output_dir"], "previews", "step-000004.png").is_file()


@pytest.mark.full
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_card_s_code_runs(options, base_folder, tmp_path, monkeypatch, use_dora):
    run(options, use_dora=use_dora, max_train_steps=1)
    card = Path(options["output_dir"], "README.md").read_text()
    assert "base_model_relation: adapter" in card
    assert ("DoRA of rank 2, alpha 3, " if use_dora else "LoRA of rank 2, alpha 3, ") in card
    assert ("kohya_lora_weights" in card) != use_dora
    (tmp_path / base_folder.name).symlink_to(base_folder)
    monkeypatch.chdir(tmp_path)
    stock, ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "zsnr_diffusers" not in stock
    for code in (stock, ours):
        names = {}
        exec(code, names)
        assert names["pipe"].scheduler.config.rescale_betas_zero_snr
        assert names["image"].size == (64, 64)


def test_the_plan_says_what_is_trained(options, capsys):
    train(TrainingConfig(**{**options, "lora_target_modules": ATTENTION, "dry_run": True}))
    plan = capsys.readouterr().out
    assert re.search(r"adapter: LoRA of rank 2, alpha 3, [\d,]+ parameters, on to_q to_k to_v to_out.0\n", plan)


# -- what goes wrong


def test_a_target_that_is_not_there_is_named_with_those_that_are(options):
    with pytest.raises(ValueError, match=r"has no layer 'to_x'; choose from .*conv1, .*net.2, .*to_out.0, to_q"):
        run(options, lora_target_modules=["to_q", "to_x"])


def test_a_base_that_was_saved_with_an_adapter_is_refused(options, base_folder, tmp_path):
    """Diffusers would load random weights in its place, with a warning."""
    base = shutil.copytree(base_folder, tmp_path / "adapted")
    unet = DiffusionPipeline.from_pretrained(base).unet
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    unet.save_pretrained(base / "unet")
    for rank in ({}, {"lora_rank": None, "lora_alpha": None}):
        with pytest.raises(ValueError, match=r"was saved with an adapter .*lora.*\.fuse_lora\(\)"):
            run(options, pretrained_model_name_or_path=str(base), **rank)


def test_without_peft_the_command_says_what_to_install(options, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(SystemExit, match=r"error: peft is needed .* pip install 'zsnr_diffusers\[lora\]'"):
        main(arguments(options))


def test_another_adapter_is_another_run(options):
    run(options, max_train_steps=1)
    for change in ({"lora_rank": 4}, {"lora_alpha": 2.0}, {"use_dora": True}, {"lora_target_modules": ATTENTION}):
        with pytest.raises(ValueError, match=f"as another run: --{next(iter(change))} was"):
            run(options, resume=True, **change)
    with pytest.raises(ValueError, match=r"checkpoint belongs to other networks: .*lora"):
        run(options, resume=True, force=True, use_dora=True)


def test_a_folder_with_a_lora_is_not_trained_over(options):
    Path(options["output_dir"]).mkdir()
    save_file({"x": torch.zeros(1)}, Path(options["output_dir"], LORA_FILE))
    with pytest.raises(ValueError, match="already contains a run"):
        run(options)
    with pytest.raises(ValueError, match="contains a finished run without a checkpoint"):
        run(options, resume=True)

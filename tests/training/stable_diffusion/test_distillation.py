"""A LoRA that takes a few steps without guidance in place of many with it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from child_processes import exit_code, start_ranks
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import load_file
from training_runs import same

from zsnr_diffusers import load_lora, load_pipeline
from zsnr_diffusers.core import rescale_guidance
from zsnr_diffusers.hub.lora_files import LORA_FILE
from zsnr_diffusers.training import TrainingConfig, train
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask

TIMESTEPS = [999, 749, 499, 249]


def as_v_at_zero_snr(folder, place):
    """A copy of a pipeline whose config says that it predicts v at zero terminal SNR, as those that are retrained."""
    copy = Path(shutil.copytree(folder, place))
    file = copy / "scheduler" / "scheduler_config.json"
    facts = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))
    return copy


@pytest.fixture(scope="session")
def v_folder(base_folder, tmp_path_factory):
    return as_v_at_zero_snr(base_folder, tmp_path_factory.mktemp("v") / "base")


@pytest.fixture
def options(options, v_folder):
    distill = {"distill_steps": 4, "teacher_substeps": 2, "lora_rank": 2, "lr_scheduler": "constant"}
    return {**options, **distill, "pretrained_model_name_or_path": str(v_folder), "train_batch_size": 4}


def run(options, **changes):
    """Run a configuration; the weights that it ships."""
    config = TrainingConfig(**{**options, **changes})
    train(config)
    return load_file(Path(config.output_dir, LORA_FILE))


def batch_of(task, timesteps):
    """Samples of the first rows, without caption for the last, at these timesteps."""
    samples = task.samples(range(10))
    batch = torch.utils.data.default_collate([samples[position] for position in range(len(timesteps))])
    batch["input_ids"][-1] = samples.text_inputs("")["input_ids"]
    task._no_caption = samples.text_inputs("")
    return {**batch, "timestep": torch.tensor(timesteps)}


def perturbed(task):
    """A task whose adapter is no longer that of the start."""
    torch.manual_seed(0)
    for name, parameter in task.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return task


# -- what is asked, and what should be answered


def test_with_one_step_of_the_teacher_the_target_is_its_guided_v(options, v_folder):
    guided = {"guidance_scale": 3.0, "guidance_rescale": 0.7, "keep_low_frequencies": 0}
    task = perturbed(
        StableDiffusionTask(TrainingConfig(**options | guided | {"teacher_substeps": 1, "cache": "none"}))
    )
    batch = batch_of(task, TIMESTEPS)
    asked = task.noised_batch(batch, batch["timestep"])

    pipe = DiffusionPipeline.from_pretrained(v_folder)
    with torch.no_grad():
        text = pipe.text_encoder(batch["input_ids"])[0]
        c = pipe.unet(asked.x_t, batch["timestep"], text).sample
        u = pipe.unet(asked.x_t, batch["timestep"], text[-1:].expand_as(text)).sample
    v = rescale_guidance(u + 3 * (c - u), c, 0.7)
    torch.testing.assert_close(asked.target, v, rtol=0, atol=1e-4 * v.abs().max().item())
    assert torch.equal(asked.timestep, batch["timestep"])
    assert torch.equal(asked.convert_output(v), v)


def test_the_student_meets_what_its_own_steps_make_of_noise(options, v_folder):
    task = perturbed(StableDiffusionTask(TrainingConfig(**options | {"cache": "none"})))
    batch = batch_of(task, [999, 249, 499, 749])
    asked = task.noised_batch(batch, batch["timestep"])
    scheduler = DDIMScheduler.from_pretrained(v_folder, subfolder="scheduler", clip_sample=False)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == TIMESTEPS
    with torch.no_grad():
        text, x_t = task.text_encoder(batch["input_ids"])["text"], batch["noise"]
        for timestep in TIMESTEPS:
            row = batch["timestep"].tolist().index(timestep)
            torch.testing.assert_close(asked.x_t[row], x_t[row], rtol=0, atol=1e-4 * x_t.abs().max().item())
            v = task.unet(x_t, timestep, text).sample
            x_t = scheduler.step(v, timestep, x_t).prev_sample


def test_the_adapter_is_trained_and_at_work_afterwards(options):
    task = perturbed(StableDiffusionTask(TrainingConfig(**options | {"cache": "none"})))
    before = {name for name, value in task.unet.named_parameters() if value.requires_grad}
    batch = batch_of(task, TIMESTEPS)
    asked = task.noised_batch(batch, batch["timestep"])
    assert not asked.x_t.requires_grad
    assert not asked.target.requires_grad
    assert before == {name for name, value in task.unet.named_parameters() if value.requires_grad}
    with torch.no_grad():
        adapted = task.predict(task.unet, asked.x_t, batch)
        task.unet.disable_adapters()
        assert not torch.equal(task.predict(task.unet, asked.x_t, batch), adapted)


def test_without_guidance_the_empty_caption_is_not_asked(options, monkeypatch):
    task = StableDiffusionTask(TrainingConfig(**options | {"cache": "none", "guidance_scale": 1.0}))
    sizes, predict = [], task.distillation._predict
    monkeypatch.setattr(
        task.distillation, "_predict", lambda unet, x, batch: sizes.append(len(x)) or predict(unet, x, batch)
    )
    batch = batch_of(task, TIMESTEPS)
    task.noised_batch(batch, batch["timestep"])
    assert sizes == [3, 2, 1, 4, 4]


# -- a run


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(options):
    whole = run(options)
    folder = Path(options["output_dir"])
    shutil.rmtree(folder / "checkpoint-000004")
    (folder / LORA_FILE).unlink()
    assert same(run(options, resume=True), whole)


@pytest.mark.full
def test_it_comes_nearer_to_its_teacher(options):
    """Of the same noise, over all four steps."""

    def loss(**changes):
        task = StableDiffusionTask(TrainingConfig(**options | {"cache": "none"} | changes))
        batch = batch_of(task, TIMESTEPS * 2)
        asked = task.noised_batch(batch, batch["timestep"])
        with torch.no_grad():
            return float((task.predict(task.unet, asked.x_t, batch) - asked.target).square().mean())

    before = loss()
    changes = {"max_train_steps": 60, "learning_rate": 5e-3, "lora_rank": 8, "ema_decay": 0.0, "train_batch_size": 8}
    run(options, **changes, checkpointing_steps=60)
    assert loss(lora_rank=None, lora_weights=options["output_dir"]) < 0.8 * before


@pytest.mark.slow
def test_two_processes_give_what_one_gives(options, tmp_path):
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    options |= {"train_batch_size": 4, "lora_target_modules": targets, "timestep_sampling": "stratified"}
    options |= {"guidance_scale": 2.0}  # it multiplies what batches of other sizes round otherwise
    shipped = run(options)
    others = {**options, "output_dir": str(tmp_path / "two"), "train_batch_size": 1, "gradient_accumulation_steps": 2}
    ranks = start_ranks(others, tmp_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank0.log").read_text()
    for name, value in load_file(tmp_path / "two" / LORA_FILE).items():
        # of some 4 x 1e-3 that four steps of Adam go
        torch.testing.assert_close(value, shipped[name], rtol=0, atol=1e-5)


@pytest.mark.full
def test_xl_is_distilled_too(xl_options, xl_folder, tmp_path):
    base = as_v_at_zero_snr(xl_folder, tmp_path / "xl")
    changes = {"pretrained_model_name_or_path": str(base), "distill_steps": 2, "lora_rank": 2, "max_train_steps": 2}
    assert run({**xl_options, **changes})


# -- what comes out


def test_the_result_says_how_it_is_sampled(options):
    run(options, max_train_steps=1, validation_prompts=["snow"])
    folder = Path(options["output_dir"])
    card = (folder / "README.md").read_text()
    assert re.findall(r'image = pipe\("...", (.*?)\)', card)[0] == "num_inference_steps=4, guidance_scale=1"
    assert "distilled to 4 steps without guidance, from 2 of the base for each, guidance scale 7.5" in card
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == TIMESTEPS
    pipe = load_lora(load_pipeline(options["pretrained_model_name_or_path"]), folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"  # it has no guidance to rescale
    assert (folder / "previews" / "step-000001.png").is_file()


def test_the_plan_names_the_teacher(options, capsys):
    train(TrainingConfig(**options | {"dry_run": True}))
    plan = capsys.readouterr().out
    assert "distilled: 4 steps without guidance, from 2 of the base for each, guidance scale 7.5, rescale 0.7" in plan


# -- what cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": None}, "--distill_steps=4: the base is the teacher.*pass --lora_rank"),
        ({"prediction_type": "flow_prediction"}, "leave out --prediction_type"),
        ({"rescale_betas_zero_snr": False}, "leave out .*--rescale_betas_zero_snr"),
        ({"compile": "blocks"}, "--compile=blocks would compile"),
        ({"distill_steps": None}, "--teacher_substeps=2 is of --distill_steps"),
        ({"distill_steps": 0}, "--distill_steps=0 must be above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options | changes)


def test_a_base_that_is_not_of_zero_snr_is_refused(options, base_folder):
    with pytest.raises(
        ValueError, match=r"--distill_steps needs a base that predicts v .* train the base with v_pred"
    ):
        run(options, pretrained_model_name_or_path=str(base_folder))


def test_more_steps_than_timesteps_are_refused(options):
    with pytest.raises(ValueError, match=r"--distill_steps=4 --teacher_substeps=251: 251 steps do not fit between"):
        run(options, teacher_substeps=251)


def test_a_run_cannot_go_on_with_other_guidance(options):
    run(options, max_train_steps=2)
    with pytest.raises(ValueError, match=r"--guidance_scale was 7\.5 and is now 3\.0"):
        run(options, resume=True, guidance_scale=3.0)
    options |= {"output_dir": options["output_dir"] + "-plain", "distill_steps": None, "teacher_substeps": 4}
    run(options, max_train_steps=2)
    run(options, resume=True, guidance_scale=3.0)

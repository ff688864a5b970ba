"""Stable Diffusion that was trained on to flow matching: loaded, saved, audited, by what says so."""

import json
from types import SimpleNamespace

import pytest
import torch
from audited import found, names, stock_flow_findings
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard
from published_models import in_memory
from small_pipelines import PIPELINES
from third_parties import PIPELINE_WARNINGS
from tiny_adapters import PHI, adapted, assert_paints_alike
from tiny_checkpoints import V, assert_same_weights, checkpoint, generate, settings, tiny_pipeline, write_file

from zsnr_diffusers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    audit,
    enable_guidance_rescale,
    load_lora,
    load_pipeline,
    save_lora,
    save_pipeline,
)
from zsnr_diffusers.cli import main
from zsnr_diffusers.core import ideal_output
from zsnr_diffusers.core.flow import flow_level
from zsnr_diffusers.hub.flow_models import pipeline_source_code, required_scheduler_attributes, stock_scheduler_for
from zsnr_diffusers.hub.header import read_header
from zsnr_diffusers.hub.lora_files import KOHYA_FILE, LORA_FILE
from zsnr_diffusers.hub.model_card import FLOW_TAGS, lora_card, pipeline_card
from zsnr_diffusers.hub.saved_model import SavedModel
from zsnr_diffusers.schedulers.stock import unipc_flow_config

pytestmark = PIPELINE_WARNINGS

FLOW = "flow_prediction"
MARKS = {
    "ModelSpec": {"modelspec.prediction_type": FLOW},
    "ModelSpec's process": {"modelspec.noise_process": "flow", "modelspec.prediction_type": "velocity"},
    "plain": {"prediction_type": FLOW},
    "ours": {"zsnr_diffusers": json.dumps({"prediction_type": FLOW})},
}


# -- loading


@pytest.mark.full
@pytest.mark.parametrize("kind", ["1", "xl"])
def test_a_file_of_which_the_caller_knows_it(kind, configs, tmp_path):
    file = write_file(tmp_path / "model.safetensors", kind)
    pipe = load_pipeline(file, config=configs[kind], prediction_type=FLOW)
    assert type(pipe.scheduler) is FlowMatchMultistepScheduler
    assert pipe.scheduler.config == FlowMatchMultistepScheduler().config
    assert bool(generate(pipe).isfinite().all())
    assert pipe.scheduler.timesteps[0] == 1000


@pytest.mark.parametrize("mark", MARKS)
def test_a_file_that_says_it(mark, configs, tmp_path, said):
    file = write_file(tmp_path / "model.safetensors", "xl", metadata=MARKS[mark])
    assert type(load_pipeline(file, config=configs["xl"]).scheduler) is FlowMatchMultistepScheduler
    assert f"prediction_type={FLOW!r} by" in said("INFO")[-1]


def test_marks_of_the_base_may_stay_where_the_caller_knows_it(configs, tmp_path):
    """A model of v at zero SNR that was trained on: its keys say what it was."""
    file = write_file(tmp_path / "model.safetensors", "xl", ["v_pred", "ztsnr"])
    pipe = load_pipeline(file, config=configs["xl"], prediction_type=FLOW)
    assert type(pipe.scheduler) is FlowMatchMultistepScheduler
    assert "--zero_snr" not in str(audit(file, prediction_type=FLOW))


def test_what_is_recorded_of_the_shift_counts(configs, tmp_path):
    record = {"zsnr_diffusers": json.dumps({"prediction_type": FLOW, "shift": 2.5})}
    file = write_file(tmp_path / "model.safetensors", "xl", metadata=record)
    assert load_pipeline(file, config=configs["xl"]).scheduler.shift == 2.5


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.5),
        UniPCMultistepScheduler(**unipc_flow_config(2.5, 1000)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_folder_whose_scheduler_says_it(scheduler, config_of):
    pipe = load_pipeline(config_of("1", scheduler))
    assert type(pipe.scheduler) is FlowMatchMultistepScheduler
    assert pipe.scheduler.shift == 2.5
    assert bool(generate(pipe).isfinite().all())


def test_a_folder_of_which_the_caller_knows_it(configs):
    assert SavedModel.open(configs["xl"]).prediction_type == "epsilon"
    assert type(load_pipeline(configs["xl"], prediction_type=FLOW).scheduler) is FlowMatchMultistepScheduler


def test_a_scheduler_of_ours_stays(config_of):
    pipe = load_pipeline(config_of("1", FlowMatchEulerScheduler(shift=3.0)))
    assert type(pipe.scheduler) is FlowMatchEulerScheduler
    assert pipe.scheduler.shift == 3.0


def test_a_given_scheduler_stays(configs):
    scheduler = UniPCMultistepScheduler(**unipc_flow_config(1.0, 1000))
    assert type(load_pipeline(configs["1"], scheduler=scheduler).scheduler) is UniPCMultistepScheduler


def test_zero_snr_of_flow_matching_is_refused(configs):
    with pytest.raises(ValueError, match="Flow matching starts from zero SNR and has no betas to rescale"):
        load_pipeline(configs["1"], prediction_type=FLOW, rescale_betas_zero_snr=True)


def test_a_flow_model_is_not_one_of_v(config_of):
    folder = config_of("1", UniPCMultistepScheduler(**unipc_flow_config(1.0, 1000)))
    with pytest.raises(ValueError, match="has no scheduler with betas"):
        load_pipeline(folder, prediction_type=V)


def test_a_file_of_2_that_says_nothing_names_flow_matching_too(tmp_path):
    file = write_file(tmp_path / "model.safetensors", "2")
    for call in (load_pipeline, audit):
        with pytest.raises(ValueError, match="flow_prediction' if it was fine-tuned to flow matching"):
            call(file)


@pytest.mark.full
def test_places_that_disagree_are_named(configs, tmp_path, said):
    """Trainers of rectified flow leave epsilon in ModelSpec's place; the caller decides."""
    marks = {"modelspec.prediction_type": "epsilon", "prediction_type": FLOW}
    file = write_file(tmp_path / "model.safetensors", "xl", metadata=marks)
    load_pipeline(file, config=configs["xl"])
    assert any("'epsilon' according to modelspec metadata, which is used" in line for line in said("WARNING"))
    pipe = load_pipeline(file, config=configs["xl"], prediction_type=FLOW)
    assert type(pipe.scheduler) is FlowMatchMultistepScheduler


# -- saving


@pytest.mark.full
@pytest.mark.parametrize("kind", ["1", "xl"])
def test_a_folder_opens_without_this_package_and_with_it_as_it_was(kind, tmp_path):
    pipe = tiny_pipeline(kind, FlowMatchMultistepScheduler(shift=2.5))
    folder = save_pipeline(pipe, tmp_path / "pipe")
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock.scheduler) is UniPCMultistepScheduler
    assert (stock.scheduler.config.flow_shift, stock.scheduler.config.prediction_type) == (2.5, FLOW)
    assert bool(generate(stock).isfinite().all())
    back = load_pipeline(folder)
    assert type(back.scheduler) is FlowMatchMultistepScheduler
    assert settings(back.scheduler) == settings(pipe.scheduler)
    assert_same_weights(pipe, back)
    assert torch.equal(generate(in_memory(back)), generate(pipe))
    assert "zsnr" not in (folder / "model_index.json").read_text()


@pytest.mark.full
def test_guidance_rescale_is_recorded_beside_it(tmp_path):
    pipe = enable_guidance_rescale(tiny_pipeline("1", FlowMatchMultistepScheduler()), 0.4, space="x_0")
    back = load_pipeline(save_pipeline(pipe, tmp_path / "pipe"))
    assert (back.default_guidance_rescale, back.guidance_space) == (0.4, "x_0")
    assert torch.equal(generate(in_memory(back)), generate(pipe))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["1", "2", "xl"])
def test_a_single_file_says_it(kind, configs, tmp_path, said):
    pipe = tiny_pipeline(kind, FlowMatchMultistepScheduler(shift=2.5))
    file = save_pipeline(pipe, tmp_path / "model.safetensors")
    assert any("ModelSamplingSD3" in line for line in said("WARNING"))
    header = read_header(file)
    assert header.metadata["modelspec.prediction_type"] == FLOW
    assert json.loads(header.metadata["zsnr_diffusers"]) == {"prediction_type": FLOW, "shift": 2.5}
    assert not {"v_pred", "ztsnr"} & set(header.shapes)
    assert set(header.shapes) == set(checkpoint(kind))
    back = load_pipeline(file, config=configs[kind])
    assert settings(back.scheduler) == settings(pipe.scheduler)
    assert_same_weights(pipe, back)


@pytest.mark.skipif("DreamLitePipeline" not in PIPELINES, reason="of newer diffusers")
def test_pipelines_made_for_flow_matching_get_stock_s_own_scheduler():
    code = pipeline_source_code(StableDiffusion3Pipeline)
    assert required_scheduler_attributes(code) == set()
    pipe = PIPELINES["DreamLitePipeline"].build()
    pipe.scheduler = FlowMatchMultistepScheduler.from_config(pipe.scheduler.config, shift=3.0)
    stock = stock_scheduler_for(pipe)
    assert type(stock) is FlowMatchEulerDiscreteScheduler
    assert (stock.config.shift, stock.config.use_dynamic_shifting) == (3.0, True)


@pytest.mark.parametrize("change", [{"invert_sigmas": True}, {"stochastic_sampling": True}])
def test_what_no_stock_scheduler_there_does_is_refused(change, tmp_path):
    pipe = tiny_pipeline("1", FlowMatchMultistepScheduler(**change))
    with pytest.raises(
        ValueError, match=f"{next(iter(change))}=True of FlowMatchMultistepScheduler has no equivalent diffusers"
    ):
        save_pipeline(pipe, tmp_path / "pipe")
    assert not [*tmp_path.iterdir()]


@pytest.mark.full
@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_a_lora_brings_its_flow_matching_to_a_base_of_betas(tmp_path, file):
    pipe = adapted()
    pipe.scheduler = FlowMatchMultistepScheduler(shift=2.5)
    folder = save_lora(pipe, tmp_path / "lora")
    facts = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (facts["_class_name"], facts["use_flow_sigmas"], facts["flow_shift"]) == (
        "UniPCMultistepScheduler",
        True,
        2.5,
    )
    base = tiny_pipeline("1")
    loaded = load_lora(base, folder, weight_name=file)
    assert type(loaded.scheduler) is FlowMatchMultistepScheduler
    assert loaded.scheduler.shift == 2.5
    assert loaded.default_guidance_rescale == PHI
    assert_paints_alike(loaded, pipe)


def test_cards_of_flow_matching_say_what_a_sampler_needs(tmp_path):
    pipe = adapted()
    pipe.scheduler = FlowMatchMultistepScheduler(shift=2.5)
    for card in (pipeline_card(pipe, tmp_path, "me/flow"), lora_card(pipe, tmp_path, "me/lora", dora=False)):
        assert {*FLOW_TAGS} <= {*ModelCard(card).data.tags}
        for fact in ("noise - x_0", "1000 s", "| shift | `2.5` |", "`UniPCMultistepScheduler`", "ModelSamplingSD3"):
            assert fact in card
        assert "rescale_betas_zero_snr`" not in card


# -- that stock's stand-in runs correctly


def know_the_data(pipe, mean, spread):
    """Let the network answer exactly for N(mean, spread^2), at the flow time that it is told."""

    def forward(x, timestep, *args, return_dict=True, **condition):
        level = flow_level(float(timestep) / 1000)
        velocity = ideal_output(FLOW, x.double(), level, mean, spread).to(x.dtype)
        return SimpleNamespace(sample=velocity) if return_dict else (velocity,)

    pipe.unet.forward = forward


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stocks_stand_in_leads_to_the_data(name, shift):
    """Its timesteps are truncated to integers: by up to 1 / 1000 of noise, of which the largest of 256 values is 3."""
    pipe = PIPELINES[name].build()
    pipe.scheduler = UniPCMultistepScheduler(**unipc_flow_config(shift, 1000))
    know_the_data(pipe, 0.7, 0.0)
    for n in (1, 2, 4, 10, 50):
        latents = pipe(**{**PIPELINES[name].arguments(), "num_inference_steps": n}).images
        torch.testing.assert_close(latents, torch.full_like(latents, 0.7), rtol=0, atol=4e-3)


def test_and_follows_the_exact_path_of_a_gaussian():
    """N(0, 1) in flow time: each value ends at the noise that it started from."""
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name].build()
    pipe.scheduler = UniPCMultistepScheduler(**unipc_flow_config(1.0, 1000))
    know_the_data(pipe, 0.0, 1.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipe(**{**PIPELINES[name].arguments(), "num_inference_steps": 50, "latents": noise}).images
    torch.testing.assert_close(latents, noise, rtol=0, atol=0.02)


# -- audits


@pytest.mark.full
def test_an_audit_of_a_file_that_says_it(tmp_path):
    file = write_file(tmp_path / "model.safetensors", "xl", metadata=MARKS["ModelSpec"])
    result = audit(file)
    assert (result.prediction_type, result.scheduler) == (FLOW, "FlowMatchMultistepScheduler")
    assert names(result) == {"schedule-left-behind"}
    assert f"load_pipeline({str(file)!r})" in found(result, "schedule-left-behind").remedy
    assert result.ok


def test_an_audit_of_a_file_that_says_nothing(tmp_path):
    file = write_file(tmp_path / "model.safetensors", "xl")
    result = audit(file, prediction_type=FLOW)
    assert names(result) == {"schedule-left-behind", "betas-for-flow"}
    assert f"--prediction_type {FLOW}" in found(result, "schedule-left-behind").remedy


@pytest.mark.full
def test_audits_of_what_is_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline("1", FlowMatchMultistepScheduler())
    assert audit(pipe).findings == ()
    assert names(audit(save_pipeline(pipe, tmp_path / "pipe"))) == stock_flow_findings()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert found(audit(pipe), "not-offered").severity == "error"
    pipe.scheduler = audit(pipe).fixed_scheduler()
    assert bool(generate(pipe).isfinite().all())


# -- the command


@pytest.mark.full
def test_convert_takes_it_and_says_what_to_pass(configs, tmp_path, capsys):
    file = write_file(tmp_path / "model.safetensors", "xl")
    arguments = ["convert", str(file), str(tmp_path / "folder"), "--config", str(configs["xl"])]
    assert main(arguments) == 2
    assert "--prediction_type flow_prediction" in capsys.readouterr().err
    assert not main([*arguments, "--prediction_type", FLOW])
    assert "flow_prediction" in capsys.readouterr().out
    assert type(load_pipeline(tmp_path / "folder").scheduler) is FlowMatchMultistepScheduler

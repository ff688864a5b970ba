"""The file with which people who do not have this package load a repo with its guidance."""

import ast
import builtins
import json
import os
import subprocess
import symtable
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UniPCMultistepScheduler
from guided_pipelines import generate
from hub_server import serve
from published_models import IN_MEMORY, in_memory
from small_pipelines import FLOW_PIPELINES, PIPELINES
from tiny_checkpoints import settings
from tiny_class_conditional import build, generate_classes
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import (
    disable_guidance_rescale,
    enable_guidance_rescale,
    load_pipeline,
    save_pipeline,
    write_custom_pipeline,
)
from zsnr_diffusers.hub.custom_pipeline import _PARTS, _defined_names, bundled_scheduler, custom_pipeline_source
from zsnr_diffusers.hub.model_card import pipeline_card
from zsnr_diffusers.schedulers import (
    FlowMatchEulerScheduler,
    FlowMatchMultistepScheduler,
    ZeroSNRDDIMScheduler,
    ZeroSNRDDPMScheduler,
    ZeroSNRLCMScheduler,
    ZeroSNRMultistepScheduler,
    ZeroSNRPNDMScheduler,
)
from zsnr_diffusers.schedulers.stock import unipc_flow_config

# A process in which the package does not exist; what it generates goes to a file.
WITHOUT_US = """
import sys
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
repo, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
IN_MEMORY
images = []
for more in CALLS:
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    call = {"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent", "generator": generator}
    images.append(pipe("a dark landscape", num_images_per_prompt=2, **call, **more).images)
torch.save([type(pipe).__name__, *images], target)
""".replace("IN_MEMORY", IN_MEMORY)


def in_a_process_without_us(repo, tmp_path, calls="[{}]", **environment):
    run_alone(WITHOUT_US.replace("CALLS", calls), tmp_path, repo, tmp_path / "generated.pt", **environment)
    return torch.load(tmp_path / "generated.pt")


def run_alone(code, tmp_path, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@pytest.mark.parametrize(("space", "k"), [("output", 2), ("v", 0)])
def test_a_folder_opens_with_its_guidance_where_this_package_is_not(space, k, tmp_path):
    folder = tmp_path / "repo"
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.4, space=space, keep_low_frequencies=k)
    pipe.save_pretrained(folder)
    write_custom_pipeline(pipe, folder)
    calls = '[{}, {"guidance_rescale": 0.0, "keep_low_frequencies": 0}, {"guidance_rescale": 1.0}]'
    name, default, off, full = in_a_process_without_us(folder, tmp_path, calls)
    assert name == "RescaledStableDiffusionPipeline"
    assert torch.equal(default, generate(pipe))
    assert torch.equal(off, generate(tiny_stable_diffusion()))
    assert torch.equal(full, generate(pipe, guidance_rescale=1.0))


MULTISTEP = ZeroSNRMultistepScheduler(prediction_type="v_prediction", solver_order=2)
SAMPLERS = [
    MULTISTEP,
    ZeroSNRMultistepScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=False, timestep_spacing="trailing", eta=0.5
    ),
    ZeroSNRPNDMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    ZeroSNRDDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large"),
    ZeroSNRLCMScheduler(prediction_type="v_prediction", original_inference_steps=40),
]


@pytest.mark.full
def test_a_folder_brings_its_sampler_where_this_package_is_not(tmp_path):
    """And samples by stock's, without it, where nobody trusts its code."""
    pipe = enable_guidance_rescale(tiny_stable_diffusion(MULTISTEP), 0.4)
    folder = save_pipeline(pipe, tmp_path / "repo")
    assert type(DiffusionPipeline.from_pretrained(folder).scheduler).__name__ == "EulerDiscreteScheduler"
    name, generated = in_a_process_without_us(folder, tmp_path)
    assert name == "RescaledStableDiffusionPipeline"
    assert torch.equal(generated, generate(pipe))


@pytest.mark.full
@pytest.mark.parametrize("scheduler", SAMPLERS, ids=lambda scheduler: type(scheduler).__name__)
def test_every_sampler_is_the_same_in_a_file(scheduler, tmp_path):
    pipe = tiny_stable_diffusion(scheduler)
    folder = save_pipeline(pipe, tmp_path / "repo")
    names = {}
    exec(compile((folder / "pipeline.py").read_text(), "pipeline.py", "exec"), names)
    stock = in_memory(DiffusionPipeline.from_pretrained(folder))
    other = names["RescaledStableDiffusionPipeline"](**stock.components, requires_safety_checker=False)
    theirs = other.scheduler
    assert type(theirs).__module__ != type(scheduler).__module__
    assert settings(theirs) == settings(scheduler)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), generate(pipe))


# The same of several pipelines of flow matching, each folder with its call beside it.
FLOWS_WITHOUT_US = """
import json, sys
from pathlib import Path
sys.modules["zsnr_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
for repo in Path(sys.argv[1]).glob("*Pipeline"):
    pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=str(repo), trust_remote_code=True)
    IN_MEMORY
    torch.manual_seed(0)
    call = json.loads(repo.with_suffix(".json").read_text())
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    torch.save([type(pipe).__name__, images], repo.with_suffix(".pt"))
    sys.modules.pop("diffusers_modules.local.pipeline")  # the one module that diffusers has for all local folders
""".replace("IN_MEMORY", IN_MEMORY.replace("\n", "\n    "))

FLOW_SAMPLERS = [
    FlowMatchMultistepScheduler(shift=2.5),
    FlowMatchMultistepScheduler(solver_order=3, corrector=False, eta=0.5, timestep_spacing="trailing", shift=3.0),
    FlowMatchMultistepScheduler(use_dynamic_shifting=True, base_shift=0.6, time_shift_type="linear"),
    FlowMatchEulerScheduler(shift=2.0, num_train_timesteps=500),
]


def flow_pipeline(name, scheduler=None, **changes):
    """A small pipeline, and a function that calls it; its own scheduler of stock becomes ours."""
    small = {**PIPELINES, **FLOW_PIPELINES}[name]
    pipe = small.build()
    pipe.scheduler = scheduler or FlowMatchMultistepScheduler.from_config(pipe.scheduler.config, **changes)
    return pipe, {key: value for key, value in small.arguments().items() if key != "generator"}


def generate_flow(pipe, call):
    torch.manual_seed(0)  # some do not hand their generator on to the scheduler
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def opened_with_its_code(folder):
    """The pipeline as its file makes it, in this process; the scheduler's class is the file's."""
    names = {}
    exec(compile((folder / "pipeline.py").read_text(), "pipeline.py", "exec"), names)
    cls = next(value for name, value in names.items() if name.startswith("Rescaled"))
    pipe = in_memory(cls.from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__module__ == "builtins"
    return pipe


@pytest.mark.full
def test_flow_pipelines_bring_their_sampler_where_this_package_is_not(tmp_path):
    own = {"prediction_type": "flow_prediction"}
    cases = [
        flow_pipeline("StableDiffusionPipeline", eta=0.5, **own),
        flow_pipeline("StableDiffusionXLPipeline", shift=2.5, solver_order=3, timestep_spacing="trailing", **own),
        flow_pipeline("StableDiffusion3Pipeline"),
        flow_pipeline("FluxPipeline", timestep_spacing="trailing", eta=1.0),
    ]
    enable_guidance_rescale(cases[0][0], 0.4, space="x_0")
    expected = {}
    for pipe, call in cases:
        folder = save_pipeline(pipe, tmp_path / type(pipe).__name__)
        folder.with_suffix(".json").write_text(json.dumps(call))
        expected[folder] = generate_flow(pipe, call)
    run_alone(FLOWS_WITHOUT_US, tmp_path, tmp_path)
    for folder, images in expected.items():
        name, generated = torch.load(folder.with_suffix(".pt"))
        assert name == f"Rescaled{folder.name}"
        assert torch.equal(generated, images), name


@pytest.mark.parametrize("scheduler", FLOW_SAMPLERS, ids=["shift", "sde", "dynamic", "euler"])
def test_every_sampler_of_flow_matching_is_the_same_in_a_file(scheduler, tmp_path):
    """Of the model's facts UniPC, which stands in, says three; the file says the others."""
    pipe, call = flow_pipeline("StableDiffusionPipeline", scheduler)
    folder = save_pipeline(pipe, tmp_path / "repo")
    assert type(DiffusionPipeline.from_pretrained(folder).scheduler) is UniPCMultistepScheduler
    other = opened_with_its_code(folder)
    assert settings(other.scheduler) == settings(scheduler)
    assert torch.equal(generate_flow(other, call), generate_flow(pipe, call))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("StableDiffusion3Pipeline", {"stochastic_sampling": True}),
        ("FluxPipeline", {"timestep_spacing": "trailing"}),
        ("StableDiffusionXLPipeline", {"prediction_type": "flow_prediction"}),
    ],
)
def test_pipelines_made_for_flow_matching_bring_it_too(name, changes, tmp_path):
    pipe, call = flow_pipeline(name, **changes)
    other = opened_with_its_code(save_pipeline(pipe, tmp_path / "repo"))
    assert settings(other.scheduler) == settings(pipe.scheduler)
    assert torch.equal(generate_flow(other, call), generate_flow(pipe, call))


def test_where_stock_stands_in_the_file_brings_what_load_pipeline_takes(tmp_path):
    pipe, call = flow_pipeline("StableDiffusionPipeline", UniPCMultistepScheduler(**unipc_flow_config(2.5, 1000)))
    folder = save_pipeline(pipe, tmp_path / "repo")
    loaded, other = in_memory(load_pipeline(folder)), opened_with_its_code(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FlowMatchMultistepScheduler
    assert torch.equal(generate_flow(other, call), generate_flow(loaded, call))
    assert "`pipeline.py` in this repo adds its own sampler:" in pipeline_card(pipe, folder, "acme/flow")


def test_a_sampler_of_stock_that_somebody_chose_stays(tmp_path):
    chosen = UniPCMultistepScheduler(**{**unipc_flow_config(1.0, 1000), "solver_order": 3})
    pipe, _ = flow_pipeline("StableDiffusionPipeline", chosen)
    assert bundled_scheduler(pipe) is None
    assert not (save_pipeline(pipe, tmp_path / "repo") / "pipeline.py").exists()
    # and one that stands in for none of ours: it is what such pipelines are published with
    pipe, _ = flow_pipeline("WanPipeline", UniPCMultistepScheduler(**unipc_flow_config(3.0, 1000)))
    assert bundled_scheduler(pipe) is None


def test_our_ddim_needs_no_code(tmp_path):
    """Stock's Euler stands in for it."""
    pipe = tiny_stable_diffusion(ZeroSNRDDIMScheduler(prediction_type="v_prediction"))
    assert bundled_scheduler(pipe) is None
    assert not (save_pipeline(pipe, tmp_path / "repo") / "pipeline.py").exists()
    unguided = tiny_unconditional()
    unguided.scheduler = MULTISTEP
    assert not (save_pipeline(unguided, tmp_path / "pixels") / "pipeline.py").exists()


@pytest.mark.full
def test_from_the_hub(tmp_path):
    folder = tmp_path / "repo"
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.4)
    pipe.save_pretrained(folder)
    write_custom_pipeline(pipe, folder)
    with serve({"acme/dark": folder}) as endpoint:
        _, default = in_a_process_without_us("acme/dark", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert torch.equal(default, generate(pipe))


@pytest.mark.full
def test_recorded_phi_is_read_from_the_hub(tmp_path):
    enable_guidance_rescale(tiny_stable_diffusion(), 0.4).save_pretrained(tmp_path / "repo")
    code = "import sys, zsnr_diffusers; print(zsnr_diffusers.load_pipeline('acme/dark').default_guidance_rescale)"
    with serve({"acme/dark": tmp_path / "repo"}) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        result = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
        )
    assert result.stdout.strip() == "0.4", result.stderr


def test_a_class_conditional_pipeline(tmp_path):
    """Which stock does not know at all; the scheduler is one of stock's, as ours needs this package."""
    pipe = build(type(build().scheduler)(prediction_type="v_prediction"))
    enable_guidance_rescale(pipe, 0.6)
    expected = generate_classes(pipe)
    source = write_custom_pipeline(pipe, tmp_path).read_text()
    names = {}
    exec(compile(source, "pipeline.py", "exec"), names)
    cls = names["ClassConditionalPipeline"]
    assert cls.__module__ != type(pipe).__module__
    other = cls(pipe.unet, ZeroSNRDDIMScheduler.from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate_classes(other), expected)


@pytest.mark.parametrize(
    "sampler", [None, *SAMPLERS[1:], *FLOW_SAMPLERS[2:]], ids=lambda sampler: type(sampler).__name__
)
def test_a_file_has_what_it_needs_and_nothing_else(sampler):
    source = custom_pipeline_source(StableDiffusionPipeline, 0.7, sampler=sampler)
    tree = ast.parse(source)
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert modules - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    # a file that defines a name twice would keep the later of the two
    names = [name for node in tree.body for name in _defined_names(node)]
    assert len(names) == len(set(names))
    used = {name for node in tree.body for name in globals_of(node) - {*_defined_names(node)}}
    assert used <= {*names, "__name__"} | set(dir(builtins))
    assert set(names) - used == {"RescaledStableDiffusionPipeline"}


def globals_of(node):
    """Names that a statement of a module takes from it."""
    tables, found = [symtable.symtable(ast.unparse(node), "", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return found


def test_no_name_means_two_things_in_what_files_are_made_of():
    """They share one namespace, whichever of them a file needs."""
    meanings = defaultdict(set)
    for part in _PARTS:
        for node in ast.parse(Path(part.__file__).read_text()).body:
            for name in _defined_names(node):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    alias = next(each for each in node.names if (each.asname or each.name.split(".")[0]) == name)
                    meanings[name].add((getattr(node, "module", None), alias.name))
                elif name != "__all__":
                    meanings[name].add(ast.unparse(node))
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}


def test_a_pipeline_that_does_not_rescale_gets_a_file_that_does_not(tmp_path):
    pipe = disable_guidance_rescale(enable_guidance_rescale(tiny_stable_diffusion()))
    source = write_custom_pipeline(pipe, tmp_path).read_text()
    assert "default_guidance_rescale = 0.0" in source
    assert "default_keep_low_frequencies = 0" in source


def test_a_pipeline_that_keeps_low_frequencies_and_does_not_rescale_gets_a_file_that_does_so_too(tmp_path):
    pipe = enable_guidance_rescale(tiny_stable_diffusion(), 0.0, keep_low_frequencies=2)
    folder = save_pipeline(pipe, tmp_path / "repo")
    names = {}
    exec(compile((folder / "pipeline.py").read_text(), "pipeline.py", "exec"), names)
    other = names["RescaledStableDiffusionPipeline"](**pipe.components, requires_safety_checker=False)
    assert torch.equal(generate(other), generate(pipe))
    assert "`pipeline.py` in this repo adds kept low frequencies:" in pipeline_card(pipe, folder, "acme/dark")


def test_a_pipeline_without_guidance_is_refused(tmp_path):
    with pytest.raises(TypeError, match="DDIMPipeline has no classifier-free guidance"):
        write_custom_pipeline(tiny_unconditional(), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_class_that_others_do_not_have_is_refused(tmp_path):
    class Mine(StableDiffusionPipeline):
        pass

    pipe = enable_guidance_rescale(Mine(**tiny_stable_diffusion().components, requires_safety_checker=False))
    with pytest.raises(TypeError, match="Mine is not a diffusers class"):
        write_custom_pipeline(pipe, tmp_path)

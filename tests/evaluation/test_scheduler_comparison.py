import json
import math

import pytest
import torch
from diffusers import DDPMPipeline
from tiny_class_conditional import build
from tiny_pipelines import tiny_stable_diffusion, tiny_unconditional

from zsnr_diffusers import ZeroSNRMultistepScheduler
from zsnr_diffusers.evaluation import ComparedSamples, SchedulerComparison, compare_schedulers
from zsnr_diffusers.schedulers.by_name import reference_scheduler

PROMPTS = ["a night sky", "<b>snow</b> & ice"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def compared(pipe, tmp_path_factory):
    names = ["zsnr", "euler", "heun", "FlowMatchEulerDiscreteScheduler", "euler"]
    folder = tmp_path_factory.mktemp("compared")
    options = {"reference_steps": 12, "guidance_scale": 2.0, "batch_size": 1, "output_dir": folder}
    return compare_schedulers(pipe, names, [4, 2], PROMPTS, **options), folder


def test_a_cell_is_how_far_a_sampler_is_from_many_steps(compared, pipe):
    """By the pipeline's own latents, whose noise is that of the same seeds."""
    comparison, _ = compared
    latents = {}
    for name, scheduler, n in (
        ("exact", reference_scheduler(pipe.scheduler.config), 12),
        ("zsnr", ZeroSNRMultistepScheduler.from_config(pipe.scheduler.config), 4),
    ):
        own, pipe.scheduler = pipe.scheduler, scheduler
        noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        call = {"num_inference_steps": n, "guidance_scale": 2.0, "generator": noise, "output_type": "latent"}
        latents[name] = pipe(PROMPTS, **call).images
        pipe.scheduler = own
    off = (latents["zsnr"] - latents["exact"]).square().mean((1, 2, 3)).sqrt() / latents["exact"].std()
    cell = comparison.by_scheduler()["zsnr"][4]
    assert cell.latent == pytest.approx(off.tolist(), rel=1e-3)  # sums of another order, in one batch and in two
    assert cell.distance == pytest.approx(math.sqrt(off.prod()), rel=1e-3)
    assert 0 < cell.distance < comparison.by_scheduler()["euler"][4].distance
    assert all(0 < one < 1 for one in cell.pixel)
    assert cell.network_calls == 4


def test_rows_and_columns(compared):
    comparison, _ = compared
    assert [*comparison.by_scheduler()] == ["zsnr", "euler", "heun", "FlowMatchEulerDiscreteScheduler"]
    assert comparison.steps() == [2, 4]
    assert all(len(cell.images) == 2 for cell in comparison.cells if cell.error is None)
    assert comparison.by_scheduler()["heun"][4].network_calls == 7


def test_what_fails_says_why_and_nothing_else_is_lost(compared):
    comparison, _ = compared
    failed = comparison.by_scheduler()["FlowMatchEulerDiscreteScheduler"]
    assert {cell.error for cell in failed.values()} == {
        "ValueError: FlowMatchEulerDiscreteScheduler samples flow-matching models, but this model has betas."
    }
    text = str(comparison)
    assert "FlowMatchEulerDiscreteScheduler at 2 steps failed: ValueError: " in text
    assert "heun at 4 steps called the network 7 times" in text
    assert text.splitlines()[1].split()[:2] == ["zsnr", f"{comparison.by_scheduler()['zsnr'][2].distance:.4f}"]


def test_samples_that_are_not_finite_are_a_failure(pipe, monkeypatch):
    def spoil(self, *args, **kwargs):
        return (torch.full((1, 4, 8, 8), torch.nan),)

    monkeypatch.setattr(ZeroSNRMultistepScheduler, "_step", spoil)
    with pytest.raises(ValueError, match="not finite"):  # the reference itself
        compare_schedulers(pipe, ["euler"], [1], PROMPTS[:1], reference_steps=1)


def test_the_page_has_all_in_it_and_no_prompt_becomes_markup(compared):
    comparison, folder = compared
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert page == comparison.to_html()
    assert "&lt;b&gt;snow&lt;/b&gt; &amp; ice" in page
    assert "<b>snow" not in page
    assert page.count("data:image/png;base64,") == 2 * (3 * 2 + 1)  # per prompt: three that worked, and the reference
    assert 'src="http' not in page


def test_the_file_has_every_number(compared):
    comparison, folder = compared
    read = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert read == comparison.to_dict()
    assert read["prompts"] == PROMPTS
    assert read["call"] == {"guidance_scale": 2.0}
    assert read["schedulers"]["euler"]["2"]["latent_rms"] == comparison.by_scheduler()["euler"][2].latent
    assert set(read["schedulers"]["FlowMatchEulerDiscreteScheduler"]["2"]) == {"error"}


def test_the_grid_has_a_row_for_each_prompt_and_scheduler(compared):
    comparison, _ = compared
    (width, height), cell = comparison.grid().size, 256
    assert height // cell == 2 * 4
    assert width // cell == 1 + 2 + 1


def test_the_pipeline_has_its_own_scheduler_again(compared, pipe):
    own = pipe.scheduler
    assert type(own).__name__ == "DDIMScheduler"
    with pytest.raises(ValueError, match="needs a prompt for each image"):
        compare_schedulers(pipe, ["zsnr"], [1], None, reference_steps=1)
    assert pipe.scheduler is own
    assert "step" not in vars(own)


def test_classes_and_pipelines_without_a_condition():
    comparison = compare_schedulers(build(), ["zsnr"], [2], [0, 1], reference_steps=4)
    assert [len(cell.images) for cell in comparison.cells] == [2]
    pixels = DDPMPipeline(tiny_unconditional().unet, tiny_unconditional().scheduler)
    comparison = compare_schedulers(pixels, ["ddim"], [2], reference_steps=4)
    assert [len(cell.images) for cell in comparison.cells] == [1]
    assert comparison.prompts == (None,)
    assert "None" not in comparison.to_html()


def test_a_pipeline_of_one_kind_of_scheduler_is_refused():
    with pytest.raises(
        ValueError, match=r"reference scheduler ZeroSNRMultistepScheduler does not work in DDIMPipeline: .*eta"
    ):
        compare_schedulers(tiny_unconditional(), ["ddim"], [2], reference_steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["zsnrr"], [1]), "unknown scheduler zsnrr; did you mean zsnr?"),
        ((["unipcmultistepscheduler"], [1]), "did you mean UniPCMultistepScheduler?"),
        ((["zsnr"], [0]), "steps=0 must be at least 1"),
    ],
)
def test_refused_before_anything_is_sampled(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_schedulers(None, *arguments)


def test_distances_of_nothing_and_of_the_same():
    assert math.isnan(ComparedSamples("x", 1, error="failed").distance)
    assert ComparedSamples("x", 1, latent=[0.0, 1.0]).distance == 0
    assert repr(SchedulerComparison("P", (None,), 0, {}, ComparedSamples("r", 9), [ComparedSamples("x", 1)])) == (
        "SchedulerComparison of x at 1 steps"
    )

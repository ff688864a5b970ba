"""One line swapped in every pipeline of flow matching."""

import diffusers
import numpy as np
import pytest
import torch
from pages import guide
from small_pipelines import FLOW_PIPELINES

from zsnr_diffusers import FlowMatchMultistepScheduler

_EDM = "its scheduler runs in Karras' sigmas, up to 80, where a sample is x_0 + sigma noise"
NOT_FLOW_MATCHING = {
    "Cosmos2TextToImagePipeline": _EDM,
    "Cosmos2VideoToWorldPipeline": _EDM,
    "CosmosTextToWorldPipeline": _EDM,
    "CosmosVideoToWorldPipeline": _EDM,
    "HeliosPyramidPipeline": "its scheduler has stages, which `set_timesteps` is told",
    "LTX2DFRTemporalRefinePipeline": "its scheduler is ancestral and of a class of its own",
    "LTXI2VLongMultiPromptPipeline": "its scheduler is ancestral and of a class of its own",
    "SanaSprintPipeline": "a consistency model in trigonometric time",
    "SanaSprintImg2ImgPipeline": "a consistency model in trigonometric time",
}
"""Those whose scheduler cannot be swapped, and why."""

SWAPPED = [name for name in FLOW_PIPELINES if name not in NOT_FLOW_MATCHING]


def run(name, n, ours):
    """The result of a call of n steps, and how often the denoisers were called; None where the pipeline refuses n."""
    small, calls = FLOW_PIPELINES[name], []
    pipe = small.build()
    if ours:
        pipe.scheduler = FlowMatchMultistepScheduler.from_config(pipe.scheduler.config)
    for part in small.denoisers:
        if (denoiser := getattr(pipe, part, None)) is not None:
            denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    try:
        result = getattr(pipe(**{**small.arguments(), **small.ask(n)}), small.output)
    except Exception as problem:
        return problem, len(calls)
    return flat(result), len(calls)


def flat(result):
    """All numbers of images, videos or latents."""
    if torch.is_tensor(result):
        return result.float().flatten()
    if isinstance(result, list | tuple):
        return torch.cat([flat(each) for each in result])
    return torch.from_numpy(np.asarray(result, dtype=np.float32)).flatten()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("n", [1, 4, 10])
@pytest.mark.parametrize("name", SWAPPED)
def test_one_swapped_line_runs_as_many_steps_as_stock(name, n):
    found, calls = run(name, n, ours=True)
    stock, stock_calls = run(name, n, ours=False)
    if isinstance(stock, Exception):
        assert n == 1, stock  # some pipelines cannot make a single step, whatever the scheduler
        return
    assert not isinstance(found, Exception), found
    assert bool(found.isfinite().all())
    assert len(found) == len(stock)
    assert calls == stock_calls


def test_pipelines_that_are_named_here_do_not_take_it():
    for name in NOT_FLOW_MATCHING:
        if name not in FLOW_PIPELINES:
            continue
        found, _ = outcome(name)
        assert isinstance(found, ValueError | TypeError)


def outcome(name):
    try:
        return run(name, 4, ours=True)
    except ValueError as refused:  # of the config
        return refused, 0


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="the guide counts those of diffusers 0.42")
def test_the_guide_counts_them():
    text = " ".join(guide("flow").split())
    assert f"Of the {len(FLOW_PIPELINES)} pipelines of diffusers 0.42.1" in text
    assert f"it runs in {len(SWAPPED)} (" in text

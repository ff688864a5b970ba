"""Transformers from small components: what every pipeline of theirs asks of its denoiser and of its scheduler."""

import inspect
import sys

import diffusers
import numpy as np
import pytest
import torch
from small_pipelines import FLOW_PIPELINES, NOT_BUILT, TRANSFORMER_PIPELINES
from third_parties import FLOW_WARNINGS, PIPELINE_WARNINGS

TRANSFORMERS = {**FLOW_PIPELINES, **TRANSFORMER_PIPELINES}

pytestmark = [*PIPELINE_WARNINGS, *FLOW_WARNINGS]


def tensors(result):
    """All that are in it, however nested."""
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in tensors(part)]
    return [torch.as_tensor(result)] if isinstance(result, torch.Tensor | np.ndarray) else []


def count_updates(scheduler, monkeypatch):
    """A list that grows with each step of the scheduler or of a copy of it, as some pipelines make them."""
    updates = []
    kind, step = type(scheduler), type(scheduler).step

    def counted(self, *args, **kwargs):
        updates.append(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", counted)
    return updates


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_runs_with_its_stock_scheduler(name, monkeypatch):
    small = TRANSFORMERS[name]
    pipe, calls = small.build(), []
    for denoiser in small.denoisers:
        getattr(pipe, denoiser).register_forward_hook(lambda *args: calls.append(args[0]))
    updates = count_updates(pipe.scheduler, monkeypatch)
    results = tensors(getattr(pipe(**{**small.arguments(), **small.ask(2)}), small.output))
    assert results
    assert all(result.isfinite().all() for result in results)
    assert any(result.float().std() > 0.01 for result in results)
    assert len(updates) == small.updates * small.steps(2) > 0
    assert len(calls) == small.calls * small.steps(2)
    assert {*calls} == {getattr(pipe, denoiser) for denoiser in small.denoisers}


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_seeded_and_without_a_trace(name):
    small, results = TRANSFORMERS[name], []
    before = torch.random.get_rng_state()
    first, second = small.build(), small.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    for denoiser in small.denoisers:
        one, other = getattr(first, denoiser), getattr(second, denoiser)
        assert not one.training
        assert sum(weights.numel() for weights in one.parameters()) < 10_000_000
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for pipe in (first, second):
        torch.rand(1)  # what a call draws is drawn by its own generator
        results.append(tensors(getattr(pipe(**{**small.arguments(), **small.ask(2)}), small.output)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def flow_pipelines():
    """Of the installed diffusers: those whose module or whose arguments speak of flow matching."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline) and name.endswith("Pipeline"):
            source = inspect.getsource(sys.modules[kind.__module__])
            if "FlowMatch" in source or "FlowMatch" in str(inspect.signature(kind)):
                yield name


@pytest.mark.skipif(diffusers.__version__ != "0.42.1", reason="other versions have other pipelines")
def test_all_pipelines_of_flow_matching_are_here_or_said_not_to_be():
    found = {*flow_pipelines()}
    assert len(found) > 110
    assert found <= {*FLOW_PIPELINES} | {*NOT_BUILT}
    assert not {*FLOW_PIPELINES} & {*NOT_BUILT}
    assert all(hasattr(diffusers, name) for name in NOT_BUILT)

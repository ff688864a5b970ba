"""Steps under torch.compile, and on a GPU."""

import pytest
import torch
from cases import thirds
from oracles import SAMPLERS, make, nonlinear


def run(step, scheduler, device="cpu"):
    """A run with given noise; timesteps as a pipeline passes them."""
    x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    for t in scheduler.timesteps:
        x = step(nonlinear(x, 0), t, x, variance_noise=noise, return_dict=False)[0]
    return x


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
@pytest.mark.filterwarnings("ignore:Graph break:UserWarning")  # torch 2.6 says it of every lookup
@thirds(["name"], SAMPLERS)
def test_a_compiled_step_gives_the_same(name):
    expected, compiled = make(name), make(name)
    for scheduler in (expected, compiled):
        scheduler.set_timesteps(5)
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="aot_eager")
    torch.testing.assert_close(run(step, compiled), run(expected.step, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gpu_gives_the_same_and_is_never_waited_for(name):
    expected, scheduler = make(name), make(name)
    expected.set_timesteps(9)
    scheduler.set_timesteps(9, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run(scheduler.step, scheduler, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), run(expected.step, expected), rtol=1e-5, atol=1e-5)

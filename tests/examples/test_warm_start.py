import pytest
import torch
import warm_start
from landscapes import captions, make_landscapes
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers.core import NoiseLevel, alpha_bar_table, enforce_zero_terminal_snr, ideal_output

BASE = alpha_bar_table("scaled_linear", 1000, 0.00085, 0.012)
OURS = enforce_zero_terminal_snr(BASE)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    from small_stable_diffusion import flawed_scheduler

    folder = tmp_path_factory.mktemp("flawed")
    tiny_stable_diffusion(flawed_scheduler()).save_pretrained(folder)
    return folder, make_landscapes(tmp_path_factory.mktemp("data"), 24, 16)


def test_timesteps_of_equal_snr():
    times = warm_start.equal_snr_timesteps(BASE, OURS)
    known = times.isfinite()
    assert torch.equal(known, BASE[-1] <= OURS)
    assert 0 < int((~known).sum()) < 500
    below = times[known].floor().long()
    share = times[known].double() - below
    alpha = BASE.sqrt()
    # alpha is a little curved between two timesteps, by 4e-6 at most, near the data
    found = torch.lerp(alpha[below], alpha[(below + 1).clamp(max=999)], share)
    torch.testing.assert_close(found, OURS.sqrt()[known], rtol=0, atol=1e-5)
    same = warm_start.equal_snr_timesteps(BASE, BASE)
    torch.testing.assert_close(same, torch.arange(1000.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_what_an_ideal_base_says_is_the_posterior_v(spread):
    """Of one point, and of Gaussian data."""
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for alpha in (0.05, 0.25, 0.9, 0.9999):
        level = NoiseLevel(alpha, (1 - alpha**2) ** 0.5)
        epsilon, v = (ideal_output(kind, x_t, level, -0.4, spread) for kind in ("epsilon", "v_prediction"))
        torch.testing.assert_close(warm_start.epsilon_as_v(epsilon, x_t, level), v, rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_the_base_is_asked_only_where_it_knows(flawed):
    make, *_ = warm_start.prepare(*flawed)
    conversion, asked = make(), []

    def teacher(x_t, timesteps, text):
        asked.append(timesteps)
        return type("Output", (), {"sample": torch.zeros_like(x_t)})

    conversion.teacher = teacher
    for step in range(20):
        conversion.loss(0, step, distilled_from=0.5)
    asked = torch.cat(asked)
    assert len(asked) > 50
    assert bool(asked.isfinite().all())
    assert BASE[asked.max().ceil().long()].sqrt() > 0.49


@pytest.mark.full
def test_refitting_lowers_the_loss(flawed):
    make, *_ = warm_start.prepare(*flawed)
    conversion = make()
    conversion.pipe.unet.eval()

    def loss():
        with torch.no_grad():
            return sum(float(conversion.loss(0, -1 - step)) for step in range(40))

    before = loss()
    conversion.refit(0)
    assert loss() < 0.9 * before


@pytest.mark.slow
def test_prints_and_draws(flawed, tmp_path, capsys):
    folder, data = flawed
    options = ["--flawed", folder, "--data", data, "--seeds", 1, "--marks", 1, 2, "--pictures", 1]
    figures = warm_start.main([str(option) for option in [*options, "--plot", tmp_path / "plot.png"]])
    assert list(figures) == ["plain", "distilled", "refitted"]
    text = capsys.readouterr().out
    for name, (values, seconds) in figures.items():
        assert f"{name:12}{values[0]:7.3f}{values[1]:7.3f}" in text
        assert seconds[0] <= seconds[1]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 1000
    assert len(captions()) == 6


def test_steps_until_it_stays_there():
    marks, seconds = [1, 2, 3], [10.0, 20.0, 30.0]
    assert warm_start.reached(marks, torch.tensor([0.05, 0.07, 0.06]).numpy(), seconds).split() == ["3", "30"]
    assert warm_start.reached(marks, torch.tensor([0.05, 0.05, 0.05]).numpy(), seconds).split() == ["1", "10"]
    assert warm_start.reached(marks, torch.tensor([0.05, 0.05, 0.07]).numpy(), seconds) == "never"

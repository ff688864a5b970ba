from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import logged, same, trained

from zsnr_diffusers import ZeroSNRDDPMScheduler
from zsnr_diffusers.core import loss_weights, noise_level
from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.training.checkpointing.checkpoint import list_checkpoints
from zsnr_diffusers.training.loss import LossWeighting
from zsnr_diffusers.training.pixels import PixelTask
from zsnr_diffusers.training.timesteps import SampledTimesteps

CPU = torch.device("cpu")
EVERY = torch.arange(1000)


def run(options, **changes):
    return trained(PixelTrainingConfig(**{**options, **changes}))


# -- the objective


@pytest.mark.parametrize(
    ("name", "gamma", "prediction_type", "zero_snr"),
    [
        ("constant", 5.0, "v_prediction", True),
        ("min_snr_floored", 3.0, "sample", True),
        ("soft_min_snr_floored", 5.0, "epsilon", False),
        ("min_snr", 5.0, "v_prediction", False),
    ],
)
def test_objective_is_the_loss_times_the_weight_of_its_timestep(options, name, gamma, prediction_type, zero_snr):
    facts = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    config = PixelTrainingConfig(**options, **facts, loss_weighting=name, snr_gamma=gamma)
    schedule = ZeroSNRDDPMScheduler(**facts)
    level = noise_level(schedule._table, EVERY)
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    objective = LossWeighting(config, schedule, CPU)(losses, EVERY)
    assert objective.dtype == torch.float32
    expected = losses * loss_weights(name, level, prediction_type, gamma)
    torch.testing.assert_close(objective.double(), expected, rtol=1e-6, atol=0)  # weights rounded to float32


def test_learned_uncertainty_reaches_the_logarithm_of_the_loss(options):
    """Losses whose logarithm is a curve that u can take: there the least objective is u = log(loss) everywhere."""
    config = PixelTrainingConfig(**options, loss_weighting="learned_uncertainty")
    weighting = LossWeighting(config, ZeroSNRDDPMScheduler(prediction_type="v_prediction"), CPU)
    level = noise_level(ZeroSNRDDPMScheduler(prediction_type="v_prediction")._table, EVERY)
    curve = -2.0 + 1.5 * (level.alpha**2 - level.sigma**2) + 0.5 * torch.cos(6 * torch.atan2(level.sigma, level.alpha))
    losses = curve.exp().float()
    (group,) = weighting.parameter_groups()
    optimizer = torch.optim.LBFGS(group["params"], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)
    start = weighting(losses, EVERY)
    assert torch.equal(start, losses)  # u = 0

    def closure():
        optimizer.zero_grad()
        objective = weighting(losses, EVERY).mean()
        objective.backward()
        return objective

    optimizer.step(closure)
    u = weighting.log_variance(weighting._table).detach()
    torch.testing.assert_close(u, curve.float(), rtol=0, atol=1e-3)  # float32 gradients stop the search
    least = (1 + curve).float()
    torch.testing.assert_close(weighting(losses, EVERY).detach(), least, rtol=0, atol=1e-3)


# -- runs

VARIANTS = {
    "floored": {"loss_weighting": "min_snr_floored"},
    "learned": {"loss_weighting": "learned_uncertainty"},
    "stratified": {"timestep_sampling": "stratified"},
    "antithetic": {"timestep_sampling": "antithetic"},
    "offset": {"noise_offset": 0.1},
}


@pytest.mark.slow  # the same is shown of the loop itself
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_bitwise_the_uninterrupted_run(options, tmp_path, variant):
    options["rescale_betas_zero_snr"] = variant != "offset"
    plain = run(options, output_dir=str(tmp_path / "plain"))
    whole = run(options, output_dir=str(tmp_path / "whole"), **VARIANTS[variant])
    run(options, max_train_steps=2, **VARIANTS[variant])
    assert same(run(options, resume=True, **VARIANTS[variant]), whole)
    assert not same(whole, plain)


@pytest.mark.full
def test_what_is_learned_of_uncertainty_is_in_checkpoints_and_not_in_the_pipeline(options, tmp_path):
    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if "checkpoint" not in str(path)}

    def learned(folder):
        (coefficients,) = load_file(list_checkpoints(folder)[-1] / "log_variance.safetensors").values()
        return coefficients

    whole, halves, plain = (tmp_path / name for name in ("whole", "halves", "plain"))
    run(options, output_dir=str(plain))
    options["loss_weighting"] = "learned_uncertainty"
    run(options, output_dir=str(whole))
    run(options, output_dir=str(halves), max_train_steps=2)
    run(options, output_dir=str(halves), resume=True)
    assert torch.equal(learned(whole), learned(halves))
    assert learned(whole).abs().max() > 5e-3  # steps of 0, 0.005, 0.01, 0.01
    assert files(whole) == files(plain)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["learned", "stratified"])
def test_accumulation_gives_the_loss_of_the_whole_batch(options, tmp_path, variant):
    options |= {**VARIANTS[variant], "report_to": "tensorboard", "train_batch_size": 4, "logging_steps": 2}
    options["dropout"] = 0.0  # which is drawn for a forward pass
    run(options)
    run(options, train_batch_size=2, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts"))
    whole, parts = logged(options["output_dir"]), logged(tmp_path / "parts")
    assert {"loss", *(tag for tag in whole if tag.startswith("loss/t"))} <= parts.keys()
    for tag in (tag for tag in whole if tag.startswith("loss")):
        # the sum over a batch in another order; float32 keeps seven digits
        assert parts[tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in whole[tag]]


def test_losses_by_timestep_are_those_computed_by_hand(options):
    """The network hardly moves, so what it was at the start gives every loss; weights do not enter."""
    options |= {"learning_rate": 1e-12, "dropout": 0.0, "report_to": "tensorboard", "logging_steps": 2}
    options |= {"loss_weighting": "min_snr_floored", "timestep_sampling": "antithetic", "train_batch_size": 4}
    run(options)
    task = PixelTask(PixelTrainingConfig(**options))
    samples, unet = SampledTimesteps(task.samples(range(12)), task.config.timestep_sampling, 1000, 4), task.unet.eval()
    by_hand = {}
    for position in range(16):
        one = samples[position]
        t, noise, x_0 = int(one["timestep"]), one["noise"], one["pixel_values"]
        alpha, sigma = (float(part) for part in noise_level(task.schedule._table, t))
        with torch.no_grad():
            output = unet((alpha * x_0 + sigma * noise)[None], t, one["class_labels"][None]).sample[0]
        error = float((output - (alpha * noise - sigma * x_0)).square().mean())
        step = 2 + 2 * (position // 8)
        by_hand.setdefault((f"loss/t{t // 100}00-{t // 100}99", step), []).append(error)
    values = {(tag, step): value for tag, pairs in logged(options["output_dir"]).items() for step, value in pairs}
    found = {key: value for key, value in values.items() if key[0].startswith("loss/t")}
    assert found.keys() == by_hand.keys()
    for key, errors in by_hand.items():
        assert found[key] == pytest.approx(sum(errors) / len(errors), rel=1e-4)  # float32 through a network


def test_the_model_card_names_weights_and_offset(options):
    run(options, max_train_steps=1, loss_weighting="min_snr_floored", snr_gamma=4)
    card = Path(options["output_dir"], "README.md")
    assert "mean squared error of `v_prediction`, weights `min_snr_floored` with gamma 4 |" in card.read_text()
    options["output_dir"] += "-offset"
    run(options, max_train_steps=1, noise_offset=0.1, rescale_betas_zero_snr=False)
    card = Path(options["output_dir"], "README.md")
    assert "`v_prediction`, weight 1 at every timestep, noise offset 0.1 |" in card.read_text()


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weighting": "min_snr"}, "gives the last timestep weight 0"),
        ({"noise_offset": 0.1}, r"the noise at the last timestep would not be N\(0, I\)"),
    ],
)
def test_schedules_that_end_at_zero_by_themselves_are_known(options, changes, message):
    with pytest.raises(ValueError, match=message):
        run(options, rescale_betas_zero_snr=False, beta_end=1.0, **changes)
    assert not Path(options["output_dir"]).exists()
    assert run(options, rescale_betas_zero_snr=False, max_train_steps=1, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weighting": "min_snr_floored"}, "--loss_weighting was 'constant' and is now 'min_snr_floored'"),
        ({"timestep_sampling": "stratified"}, "--timestep_sampling was 'uniform' and is now 'stratified'"),
        ({"snr_gamma": 4.0}, "--snr_gamma was 5.0 and is now 4.0"),
    ],
)
def test_a_run_goes_on_with_the_objective_it_began_with(options, changes, message):
    run(options, max_train_steps=1)
    with pytest.raises(ValueError, match=message):
        run(options, resume=True, **changes)

import functools
from collections import Counter

import pytest
import scipy.special
import scipy.stats
import torch
from accelerate import Accelerator

from zsnr_diffusers.core import flow_times
from zsnr_diffusers.training import PixelTrainingConfig
from zsnr_diffusers.training.data.loader import DistributedBatchSampler, TrainingDataset, create_dataloader
from zsnr_diffusers.training.timesteps import (
    LossByTimestep,
    SampledFlowTimes,
    SampledSteps,
    SampledTimesteps,
    stratified_timestep,
)

SAMPLINGS = ["uniform", "stratified", "antithetic"]


class Draws(TrainingDataset):
    """Samples of nothing but what every sample has."""

    num_train_timesteps = 1000

    def sample(self, index, draw):
        timestep = torch.randint(self.num_train_timesteps, (), generator=draw)
        return {"timestep": timestep, "noise": torch.randn(3, 4, 4, generator=draw)}


def config_of(**options):
    return PixelTrainingConfig(train_data_dir="d", **options)


def timesteps(sampling, count, global_batch, num_train_timesteps=1000, seed=0):
    config = config_of(seed=seed)
    samples = Draws(None, range(7), config)
    samples.num_train_timesteps = num_train_timesteps
    spread = SampledTimesteps(samples, sampling, num_train_timesteps, global_batch)
    return torch.stack([spread[position]["timestep"] for position in range(count)])


@pytest.mark.parametrize(("count", "total"), [(1, 10), (3, 10), (10, 10), (16, 10), (7, 1000)])
def test_a_uniform_place_and_a_uniform_timestep_make_a_uniform_timestep(count, total):
    """Exactly: all pairs of the two give every timestep equally often, whether or not the parts are whole."""
    drawn = Counter(stratified_timestep(t, place, count, total) for place in range(count) for t in range(total))
    assert drawn == dict.fromkeys(range(total), count)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_timesteps_are_uniform_at_every_place_of_a_batch(sampling):
    """Chi-square of 3000 steps; a right sampler fails at one of the four places once in 2500 seeds; ours is fixed."""
    steps, batch, total = 3000, 4, 10
    drawn = timesteps(sampling, steps * batch, batch, total).reshape(steps, batch)
    for place in range(batch):
        counts = torch.bincount(drawn[:, place], minlength=total)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_strata_have_one_timestep_each():
    for batch in (8, 12):
        drawn = timesteps("stratified", 20 * batch, batch).reshape(20, batch).sort(dim=1).values
        for place in range(batch):
            assert drawn[:, place].min() >= place * 1000 // batch
            assert drawn[:, place].max() <= (place + 1) * 1000 / batch
        assert len(drawn[:, 0].unique()) > 10  # jittered
    assert torch.equal(timesteps("stratified", 20, 1), timesteps("uniform", 20, 1))


def test_antithetic_timesteps_come_in_pairs():
    drawn = timesteps("antithetic", 200, 8)
    assert bool((drawn[::2] + drawn[1::2] == 999).all())
    assert len(drawn[::2].unique()) > 80


def test_batch_means_vary_less():
    """Of f(t) = t / T: 1 / (12 B) if independent, 1 / (12 B^3) in strata, 0 in pairs; of its square, less in both."""
    batch, steps = 8, 500
    drawn = {name: timesteps(name, steps * batch, batch).reshape(steps, batch) / 1000 for name in SAMPLINGS}
    variance = {name: float(values.mean(dim=1).var()) for name, values in drawn.items()}
    # A variance from 500 means is off by 6 % (one standard deviation).
    assert variance["uniform"] == pytest.approx(1 / (12 * batch), rel=0.3)
    assert variance["stratified"] == pytest.approx(1 / (12 * batch**3), rel=0.3)
    assert variance["antithetic"] < 1e-12
    squares = {name: float((values**2).mean(dim=1).var()) for name, values in drawn.items()}
    assert squares["stratified"] < squares["antithetic"] / 2 < squares["uniform"] / 4


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_global_batch_is_the_same_however_it_is_divided(sampling):
    def drawn(world_size, accumulation, first=0):
        config = config_of(
            train_batch_size=8 // (world_size * accumulation),
            gradient_accumulation_steps=accumulation,
        )
        spread = SampledTimesteps(Draws(None, range(7), config), sampling, 1000, 8)
        ranks = [
            torch.cat([batch["timestep"] for batch in create_dataloader(spread, positions, config)])
            for positions in (
                DistributedBatchSampler(config, range(first, 3), rank, world_size) for rank in range(world_size)
            )
        ]
        passes = [rank.reshape(3 - first, accumulation, -1) for rank in ranks]
        return torch.cat(passes, dim=2).flatten(1)

    whole = drawn(1, 1)
    for world_size, accumulation in ((1, 4), (2, 1), (2, 2), (4, 2)):
        assert torch.equal(drawn(world_size, accumulation), whole)
    assert torch.equal(drawn(1, 1, first=2), whole[2:])  # as after a resume
    assert len(whole.unique()) > 10


def test_seeds_and_steps_differ():
    for sampling in SAMPLINGS:
        first, second = timesteps(sampling, 64, 16), timesteps(sampling, 64, 16, seed=1)
        assert not torch.equal(first, second)
        assert not torch.equal(first[:16], first[16:32])


# -- noise offset


def test_noise_offset_is_that_of_stock_and_a_function_of_the_position():
    """noise + offset * N(0, 1) for each sample and channel, as in diffusers' train_text_to_image."""
    plain, offset = (Draws(None, range(7), config_of(), noise_offset=value) for value in (0.0, 0.5))
    shift = torch.stack([(offset[p]["noise"] - plain[p]["noise"]) / 0.5 for p in range(1000)])
    assert (shift - shift[:, :, :1, :1]).abs().max() < 1e-5  # one number per channel
    numbers = shift[:, :, 0, 0]
    assert numbers.mean().item() == pytest.approx(0, abs=4 / 3000**0.5)
    assert numbers.std().item() == pytest.approx(1, abs=4 / 6000**0.5)
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 4 / 1000**0.5
    again = Draws(None, range(7), config_of(), noise_offset=0.5)
    assert torch.equal(again[5]["noise"], offset[5]["noise"])
    assert all(torch.equal(plain[p]["timestep"], offset[p]["timestep"]) for p in range(10))


# -- loss by timestep


def test_means_are_those_made_by_hand():
    accelerator, losses = Accelerator(cpu=True), LossByTimestep(1000, torch.device("cpu"))
    losses.add(torch.tensor([1.0, 3.0, 5.0], requires_grad=True), torch.tensor([0, 99, 100]))
    losses.add(torch.tensor([2.0, 4.0, 7.0]), torch.tensor([42, 998, 999]))
    assert losses.means(accelerator) == {
        "loss/t000-099": 2.0,
        "loss/t100-199": 5.0,
        "loss/t900-999": 5.5,
        "loss/last": 7.0,
    }
    assert losses.means(accelerator) == {}  # a new start
    losses.add(torch.tensor([0.5]), torch.tensor([500]))
    assert losses.means(accelerator) == {"loss/t500-599": 0.5}


@pytest.mark.parametrize("total", [4, 15, 1024])
def test_bins_cover_every_timestep_once(total):
    losses = LossByTimestep(total, torch.device("cpu"))
    losses.add(torch.arange(total, dtype=torch.float32), torch.arange(total))
    means = losses.means(Accelerator(cpu=True))
    assert means.pop("loss/last") == total - 1
    covered = []
    for name, mean in means.items():
        first, last = map(int, name.removeprefix("loss/t").split("-"))
        assert mean == pytest.approx((first + last) / 2)
        covered += range(first, last + 1)
    assert covered == list(range(total))


# -- flow times


def flow_draws(sampling, count, global_batch, density="logit_normal", seed=0, **options):
    samples = SampledFlowTimes(
        Draws(None, range(7), config_of(seed=seed)),
        sampling,
        functools.partial(flow_times, sampling=density, **options),
        global_batch,
    )
    return torch.stack([samples[position]["timestep"] for position in range(count)])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"density": "uniform"}, scipy.stats.uniform().cdf),
        ({}, lambda s: scipy.stats.norm().cdf(scipy.special.logit(s))),
        ({"logit_mean": 0.5, "logit_std": 0.7}, lambda s: scipy.stats.norm(0.5, 0.7).cdf(scipy.special.logit(s))),
        ({"density": "uniform", "shift": 3.0}, lambda s: s / (3 - 2 * s)),
    ],
)
def test_flow_times_have_their_law_at_every_place_of_a_batch(sampling, options, law):
    """Kolmogorov-Smirnov of 600 steps; a right sampler fails once in 2500 seeds, and the seed is fixed."""
    drawn = flow_draws(sampling, 600 * 4, 4, **options).double() / 1000
    assert drawn.min() > 0
    assert drawn.max() <= 1
    for place in range(4):
        assert scipy.stats.kstest(drawn.reshape(600, 4)[:, place].numpy(), law).pvalue > 1e-4


def test_flow_times_of_a_global_batch_are_more_even():
    u = flow_draws("stratified", 160, 8, density="uniform").reshape(20, 8).sort(dim=1).values / 1000
    places = torch.arange(8) / 8
    assert bool(((u >= places) & (u <= places + 1 / 8)).all())
    pairs = flow_draws("antithetic", 160, 8).double() / 1000
    torch.testing.assert_close(pairs[::2] + pairs[1::2], torch.ones(80, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_flow_times_are_of_the_seed_and_the_position_alone(sampling):
    whole, other = flow_draws(sampling, 32, 8), flow_draws(sampling, 32, 8, seed=1)
    assert torch.equal(whole, flow_draws(sampling, 32, 8))
    assert not bool((whole == other).any())
    samples = SampledFlowTimes(Draws(None, range(7), config_of()), sampling, flow_times, 8)
    assert torch.equal(samples[29]["timestep"], whole[29])  # as after a resume
    assert torch.equal(samples[29]["noise"], Draws(None, range(7), config_of())[29]["noise"])


def test_losses_at_flow_times_are_in_the_bins_of_their_whole_part():
    losses = LossByTimestep(1000, torch.device("cpu"))
    losses.add(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.4, 99.9, 999.2, 1000.0]))
    assert losses.means(Accelerator(cpu=True)) == {"loss/t000-099": 2.0, "loss/t900-999": 6.0, "loss/last": 6.0}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_few_timesteps_are_drawn_as_often_as_each_other(sampling):
    """Chi-square, as above; strata of a batch as large as the timesteps are many have each of them once."""
    chosen, batch, steps = [999, 749, 499, 249], 4, 500
    samples = SampledSteps(Draws(None, range(7), config_of()), sampling, chosen, batch)
    drawn = [int(samples[position]["timestep"]) for position in range(batch * steps)]
    assert scipy.stats.chisquare([drawn.count(timestep) for timestep in chosen]).pvalue > 1e-4
    if sampling == "stratified":
        rows = [sorted(drawn[first : first + batch]) for first in range(0, len(drawn), batch)]
        assert rows == [sorted(chosen)] * steps
    if sampling == "antithetic":
        assert all(a + b == 999 + 249 for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    again = SampledSteps(Draws(None, range(7), config_of(seed=1)), sampling, chosen, batch)
    assert drawn[:40] != [int(again[position]["timestep"]) for position in range(40)]

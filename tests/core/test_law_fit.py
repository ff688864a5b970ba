import pytest
import torch

from zsnr_diffusers.core.law_fit import FOLDS, fit_law, split_into_folds
from zsnr_diffusers.core.noise import alpha_bar_table, noise_level

LEVEL = noise_level(alpha_bar_table("scaled_linear", 1000, 0.00085, 0.012), 999)
C, K, F = 4, 4, 64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(number, explained=0.8, power=2, seed=0):
    """Amplitudes with power in the lowest `power` x `power` frequencies, a share of which the features explain."""
    g = generator(seed)
    features = (
        torch.randn(number, F, generator=g, dtype=torch.float64) @ torch.diag(torch.arange(1, F + 1) ** -1.0).double()
    )
    weight = torch.randn(F, C * K * K, generator=generator(99), dtype=torch.float64)
    mean = features @ weight
    mean /= mean.std(0)
    residual = torch.randn(number, C * K * K, generator=g, dtype=torch.float64)
    x = explained**0.5 * mean + (1 - explained) ** 0.5 * residual + 0.5
    low = torch.zeros(K, K, dtype=torch.float64)
    low[:power, :power] = 0.6
    return x.reshape(number, C, K, K) * low, features


def fit(x, features, groups=None):
    folds = split_into_folds(range(len(x)) if groups is None else groups)
    return fit_law(x, features, folds, LEVEL, 64 * 64, range(1, K + 1))


def test_the_law_of_the_data_is_found():
    x, features = data(4000)
    found = fit(x, features)
    assert found.law.frequencies == 2
    torch.testing.assert_close(
        found.explained[:2, :2], torch.full((2, 2), 0.8, dtype=torch.float64), rtol=0, atol=0.02
    )
    fresh, more = data(4000, seed=5)
    residuals = (fresh[..., :2, :2] - found.law.mean(more)).flatten(1)
    expected = 0.2 * 0.6**2 * torch.eye(4 * C, dtype=torch.float64)
    torch.testing.assert_close(residuals.mT @ residuals / len(residuals), expected, rtol=0, atol=0.008)
    torch.testing.assert_close(found.law.covariance.double(), expected, rtol=0, atol=0.008)


@pytest.mark.parametrize("number", [30, 100, 1000])
def test_what_captions_do_not_say_is_not_claimed(number):
    x, features = data(number)
    shuffled = features[torch.randperm(number, generator=generator(3))]
    found = fit(x, shuffled)
    assert float(found.explained.max()) < 0.1
    assert float(found.law.weight.square().sum()) < 0.05 * float(fit(x, features).law.weight.square().sum())
    torch.testing.assert_close(found.law.bias.double(), x.mean(0)[..., :2, :2], rtol=0, atol=0.15)


def test_no_more_frequencies_than_the_data_have_power_in():
    for power in (1, 2, 3):
        assert fit(*data(1000, power=power)).law.frequencies == power


def test_few_images_are_explained_less_but_honestly():
    """What is said of images held out is what comes true of fresh ones."""
    fresh, features = data(4000, seed=5)
    for number in (60, 300):
        found = fit(*data(number))
        k = found.law.frequencies
        error = (fresh[..., :k, :k] - found.law.mean(features)).square().mean(0).sum(0)
        true = 1 - error / fresh[..., :k, :k].var(dim=0).sum(0)
        assert float((found.explained[:k, :k] - true).abs().max()) < 0.15
        assert 0.1 < float(true[0, 0]) < 0.8


def test_gains_are_those_of_a_direct_computation():
    """Log likelihood of x_T, by sampled noise, under the law of other folds, less that under pure noise."""
    x, features = data(500, power=1)
    found = fit(x, features[:, :0])
    block = x[:, :, :1, :1].flatten(1) * float(LEVEL.alpha) * 64
    folds = split_into_folds(range(500))
    total = 0.0
    for fold in range(FOLDS):
        train, test = block[folds != fold], block[folds == fold]
        covariance = torch.cov(train.mT, correction=0)
        sigma = float(LEVEL.sigma) * torch.eye(C, dtype=x.dtype)
        noisy = test.repeat(200, 1)
        noisy = noisy + torch.randn(noisy.shape, generator=generator(8), dtype=x.dtype) @ sigma
        law = torch.distributions.MultivariateNormal(train.mean(0), covariance + sigma @ sigma)
        noise = torch.distributions.MultivariateNormal(torch.zeros(C, dtype=x.dtype), sigma @ sigma)
        total += float((law.log_prob(noisy) - noise.log_prob(noisy)).sum()) / 200
    assert found.gains[1] == pytest.approx(total / 500, abs=0.1)  # shrinkage, and the noise of 200 draws each


def test_the_mean_of_data_without_features():
    x, features = data(200)
    found = fit(x, features[:, :0])
    assert found.law.num_features == 0
    torch.testing.assert_close(found.law.bias.double(), x.mean(0)[..., :2, :2])
    assert float(found.explained.abs().max()) == 0


def test_captions_are_held_out_whole_where_there_are_enough():
    groups = [i % 40 for i in range(400)]
    folds = split_into_folds(groups)
    assert all(len({int(folds[i]) for i in range(400) if groups[i] == group}) == 1 for group in range(40))
    assert {*folds.tolist()} == {*range(FOLDS)}
    few = split_into_folds([i % 6 for i in range(400)])
    assert few.bincount().tolist() == [80] * FOLDS

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from zsnr_diffusers.evaluation import (
    FeatureOrigin,
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
)

few_images = pytest.mark.filterwarnings("ignore:.*images for .* features:UserWarning")


def correlated(seed, n, d, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + offset


def distance(x, y):
    return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


# Fréchet distance


def distance_by_roots(x, y):
    """As the paper's code has it: scipy's root of the product of covariances, reliable while they are regular."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(a + b) - 2 * np.trace(linalg.sqrtm(a @ b)).real


def distance_in_the_span(x, y):
    """For singular covariances: in a basis of all images, by the eigenvalues of the product that are not zero."""
    basis = linalg.orth(np.concatenate([x, y]).T)
    a, b = np.cov(x @ basis, rowvar=False), np.cov(y @ basis, rowvar=False)
    rank = min(len(x), len(y)) - 1
    values = np.sort(linalg.eigvals(a @ b).real)[-rank:]
    shift = (x.mean(0) - y.mean(0)) @ basis
    return shift @ shift + np.trace(a + b) - 2 * np.sqrt(values).sum()


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 2), (300, 200, 16), (500, 900, 64)])
def test_frechet_distance_equals_the_papers_formula(n, m, d):
    x, y = correlated(1, n, d), correlated(2, m, d, offset=0.3)
    assert distance(x, y) == pytest.approx(distance_by_roots(x, y), rel=1e-9)


@few_images
@pytest.mark.parametrize(("n", "m", "d"), [(5, 5, 8), (20, 12, 64), (40, 60, 300), (8, 400, 64)])
def test_frechet_distance_of_fewer_images_than_features(n, m, d):
    x, y = correlated(1, n, d), correlated(2, m, d, offset=0.1)
    assert distance(x, y) == pytest.approx(distance_in_the_span(x, y), rel=1e-8)
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-12)


def test_one_feature():
    """In one dimension the distance is (μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    x, y = np.random.default_rng(0).normal(size=(2, 50, 1)) * [[[2.0]], [[0.5]]] + 1
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_exact_gaussians_with_commuting_covariances():
    """Covariances with common eigenvectors: |μ₁ − μ₂|² + Σ (√λ₁ − √λ₂)²; zero eigenvalues are no special case."""
    rotation = linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    first, second = np.array([4.0, 1, 0.25, 0]), np.array([1.0, 9, 0, 0])
    a = FeatureStatistics.from_moments(np.zeros(4), rotation * first @ rotation.T, 1000)
    b = FeatureStatistics.from_moments([1, 2, 0, 2], rotation * second @ rotation.T, 50)
    # The eigenvalues that are zero come as rounding; their roots would add 1e-8.
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 4 + 0.25, rel=1e-12)


def test_exact_gaussians_that_do_not_commute():
    """In two dimensions tr √M = √(tr M + 2 √det M)."""
    a, b = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -0.5], [-0.5, 4]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(linalg.det(a) * linalg.det(b)))
    found = frechet_distance(*(FeatureStatistics.from_moments(np.zeros(2), c, 100) for c in (a, b)))
    assert found == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-12)


@few_images
@pytest.mark.parametrize(("n", "d"), [(200, 10), (10, 50)])
def test_equal_sets_and_shifted_ones(n, d):
    for seed in range(10):  # rounding goes both ways, the distance does not
        x = correlated(seed, n, d)
        scale = np.trace(np.cov(x, rowvar=False))
        assert 0 <= distance(x, x[::-1]) <= 1e-13 * scale
    # Rounding of the mean grows with the shift.
    assert distance(x, x + 100) == pytest.approx(1e4 * d, rel=1e-12)


def test_scaled_set():
    x = correlated(0, 100, 6)
    x -= x.mean(0)
    assert distance(x, 3 * x) == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)), rel=1e-12)


def test_features_that_never_vary():
    """Dead units, and one feature that is a copy of another: sqrtm of such a product is not to be had."""
    x, y = correlated(1, 60, 6), correlated(2, 60, 6)
    padded = [np.concatenate([f, f[:, :1], np.full((60, 2), 7.0)], axis=1) for f in (x, y)]
    doubled = [f * [math.sqrt(2), 1, 1, 1, 1, 1] for f in (x, y)]  # the copy adds the first direction once more
    assert distance(*padded) == pytest.approx(distance(*doubled), rel=1e-12)


def test_fewer_images_than_features_are_warned_of_with_the_bias():
    x, y = correlated(0, 8, 8), correlated(1, 9, 8)
    with pytest.warns(UserWarning, match=r"^8 images for 8 features.*too large.*1 / images.*Use more images"):
        few = distance(x, y)
    assert few > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(y, y)


def test_bias_falls_as_one_over_the_number_of_images():
    def mean_distance(n):
        rng = np.random.default_rng(n)
        return np.mean([distance(*rng.normal(size=(2, n, 4))) for _ in range(100)])

    assert mean_distance(50) / mean_distance(200) == pytest.approx(4, rel=0.15)


def test_statistics_of_different_networks_are_refused():
    a, b = (FeatureStatistics.of(np.eye(4)[:, :2], FeatureOrigin(name, "none", "")) for name in ("one", "two"))
    with pytest.raises(ValueError, match=r"one.*two.*same network"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="2 and 3 features"):
        frechet_distance(a, FeatureStatistics.of(np.ones((9, 3))))
    with pytest.raises(ValueError, match="0 images; at least 2"):
        frechet_distance(FeatureStatistics(), FeatureStatistics())


# Inception Score


def score_by_loops(p, splits):
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        marginal = part.mean(0)
        divergences = [sum(q * math.log(q / r) for q, r in zip(row, marginal, strict=True)) for row in part]
        scores.append(math.exp(sum(divergences) / len(part)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize(("n", "splits"), [(100, 10), (103, 10), (7, 7), (20, 1)])
def test_inception_score_equals_the_papers_code(n, splits):
    logits = np.random.default_rng(n).normal(size=(n, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = score_by_loops(p, splits)
    for score in (inception_score(logits, splits), inception_score(p, splits, probabilities=True)):
        assert (score.mean, score.std) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert (score.n, score.splits) == (n, splits)
    assert inception_score(torch.from_numpy(logits).float() + 100, splits).mean == pytest.approx(expected[0], rel=1e-5)


def test_uniform_predictions_score_one():
    score = inception_score(np.zeros((50, 1000)))
    assert (score.mean, score.std) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("confidence", [50, 1e4])
def test_confident_balanced_predictions_score_the_number_of_classes(confidence):
    """In consecutive splits: each of ten holds every class twice. At 1e4, softmax underflows to exact zeros."""
    logits = np.tile(np.eye(6), (20, 1)) * confidence
    score = inception_score(logits)
    assert (score.mean, score.std) == pytest.approx((6, 0), abs=1e-9)
    one_class_each = inception_score(np.repeat(np.eye(6), 20, axis=0) * confidence, splits=6)
    assert (one_class_each.mean, one_class_each.std) == pytest.approx((1, 0), abs=1e-9)


def test_two_kinds_of_prediction():
    """Half certain of class 0, half of class 0 or 1: E KL is H(3/4, 1/4) − log(2) / 2."""
    p = np.array([[1, 0], [0.5, 0.5]] * 10)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    score = inception_score(p, probabilities=True)
    assert score.mean == pytest.approx(math.exp(entropy - math.log(2) / 2))


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (np.zeros((5, 3)), {}, "splits.* 5; got 10"),
        (np.zeros((5, 3)), {"splits": 0}, "splits.* 5; got 0"),
        (np.full((10, 2), 3.0), {"probabilities": True}, "sums from 6 to 6"),
        (np.array([[1.5, -0.5]] * 10), {"probabilities": True}, "values from -0.5"),
        (np.full((10, 2), np.nan), {}, "logits: 10 of 10 rows"),
    ],
)
def test_scores_of_what_is_none(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        inception_score(values, **arguments)


# Kernel distance


def mmd2_by_loops(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize(("n", "m", "d"), [(3, 3, 1), (12, 9, 5), (10, 15, 40)])
def test_kernel_distance_and_its_jackknife_equal_double_loops(n, m, d):
    x, y = correlated(1, n, d), correlated(2, m, d, offset=0.5)
    found = kernel_distance(x, y)
    assert (found.n, found.m) == (n, m)
    assert found.value == pytest.approx(mmd2_by_loops(x, y), rel=1e-10)
    if n > 3:
        left_out = [
            [mmd2_by_loops(np.delete(x, i, 0), y) for i in range(n)],
            [mmd2_by_loops(x, np.delete(y, i, 0)) for i in range(m)],
        ]
        variance = sum((len(v) - 1) / len(v) * np.sum((v - np.mean(v)) ** 2) for v in left_out)
        assert found.error == pytest.approx(math.sqrt(variance), rel=1e-8)


def test_blocks_do_not_show(monkeypatch):
    x, y = correlated(1, 50, 4), correlated(2, 41, 4)
    whole = kernel_distance(x, y)
    monkeypatch.setattr("zsnr_diffusers.evaluation.distances.KERNEL_BLOCK", 7)
    blocks = kernel_distance(x, y)
    assert (blocks.value, blocks.error) == pytest.approx((whole.value, whole.error), rel=1e-10)


def test_a_set_against_itself_is_not_taken_for_one_set():
    x = correlated(1, 12, 5)
    assert kernel_distance(x, x).value == pytest.approx(mmd2_by_loops(x, x), rel=1e-9)
    assert kernel_distance(x, x).value < 0  # the unbiased statistic of equal sets


def test_subsets_equal_loops_over_the_same_subsets():
    x, y = correlated(1, 12, 3), correlated(2, 10, 3, offset=0.5)
    found = kernel_distance_of_subsets(x, y, num_subsets=4, subset_size=6, seed=3)
    rng = np.random.default_rng(3)
    values = []
    for _ in range(4):
        a, b = x[rng.choice(12, 6, replace=False)], y[rng.choice(10, 6, replace=False)]
        values.append(mmd2_by_loops(a, b))
    assert (found.value, found.error) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    whole = kernel_distance_of_subsets(x[:10], y, num_subsets=3, subset_size=10)
    assert whole.value == pytest.approx(kernel_distance(x[:10], y).value, rel=1e-10)
    assert whole.error == pytest.approx(0, abs=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("shift", [0, 0.4])
def test_kernel_distance_has_no_bias_and_an_honest_error(shift):
    """Of the Gaussians N(0, 1) and N(shift, 1): E k(x, y) = 1 + 3 (μν) + 3 E(xy)² + E(xy)³ in one dimension."""

    def mean_kernel(mu, nu):
        second, third = (1 + mu**2) * (1 + nu**2), (mu**3 + 3 * mu) * (nu**3 + 3 * nu)
        return 1 + 3 * mu * nu + 3 * second + third

    exact = mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)
    rng, repeats = np.random.default_rng(0), 2000
    found = [kernel_distance(rng.normal(size=(40, 1)), rng.normal(shift, 1, (60, 1))) for _ in range(repeats)]
    values = np.array([f.value for f in found])
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / math.sqrt(repeats))
    ratio = math.sqrt(np.mean([f.error**2 for f in found])) / values.std()
    assert 0.95 < ratio < 1.5  # up to √2 where the distributions are equal, more by chance


@given(st.integers(0, 1000))
def test_kernel_distance_does_not_depend_on_the_order(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(7, 3))
    one, other = kernel_distance(x, y), kernel_distance(rng.permutation(y), rng.permutation(x))
    assert (one.value, one.error) == pytest.approx((other.value, other.error), rel=1e-9, abs=1e-12)


def test_kernel_distances_of_what_is_too_little():
    with pytest.raises(ValueError, match=r"at least 3 .* got 2 and 5"):
        kernel_distance(np.zeros((2, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="3 and 4 features"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="smaller set, 5; got 1000; kernel_distance supports"):
        kernel_distance_of_subsets(np.zeros((5, 3)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="num_subsets must be at least 1"):
        kernel_distance_of_subsets(np.zeros((5, 3)), np.zeros((9, 3)), 0, 2)


# Other implementations, where they can be installed: both need torchvision, which breaks diffusers beside a CPU torch


def test_torch_fidelity_gives_the_same():
    metrics = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = correlated(1, 300, 16), correlated(2, 200, 16, offset=0.3)
    moments = [{"mu": f.mean(0), "sigma": np.cov(f, rowvar=False)} for f in (x, y)]
    expected = metrics.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(expected, rel=1e-6)
    score = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric(torch.from_numpy(x), splits=10)
    mine = inception_score(x)
    assert (mine.mean, mine.std) == pytest.approx(tuple(score.values()), rel=1e-6)


def test_torchmetrics_gives_the_same():
    compute = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    x, y = correlated(1, 300, 16), correlated(2, 200, 16, offset=0.3)
    arguments = [torch.from_numpy(a) for f in (x, y) for a in (f.mean(0), np.cov(f, rowvar=False))]
    assert distance(x, y) == pytest.approx(float(compute(*arguments)), rel=1e-6)

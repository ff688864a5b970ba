import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import linalg

from zsnr_diffusers.evaluation import FeatureOrigin, FeatureStatistics

ORIGIN = FeatureOrigin(network="tiny", resize="none", sha256="ab" * 32)


def correlated(seed, n, d, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset


def assert_statistics(statistics, features):
    """Against numpy's own two-pass mean and covariance; rounding grows with the offset from zero."""
    scale = np.abs(features).max()
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), atol=1e-13 * scale)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, atol=1e-12 * scale * np.sqrt(np.abs(expected).max()))


@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 8), (8, 8), (9, 8), (500, 8), (20, 50)])
def test_moments_equal_numpys(n, d):
    features = correlated(n, n, d)
    statistics = FeatureStatistics.of(features)
    assert_statistics(statistics, features)
    assert len(statistics.factor) <= d
    assert statistics.dimension == d


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 7), st.integers(0, 99), st.booleans())
def test_any_split_and_any_merging_equal_one_batch(sizes, d, seed, far):
    features = correlated(seed, sum(sizes) + 1, d, offset=1e6 if far else 0)
    batches = np.split(features, np.cumsum(sizes))
    streamed = FeatureStatistics()
    for batch in batches:
        streamed.update(batch)
    assert_statistics(streamed, features)
    half = len(batches) // 2
    first, second = FeatureStatistics(), FeatureStatistics()
    for i, batch in enumerate(batches):
        (first if i < half else second).update(batch)
    first.merge(second)
    assert_statistics(first, features)


def test_small_directions_survive_beside_large_ones():
    """A spread of 1e-9 of the largest is 1e-18 in a covariance, which float64 does not hold."""
    mixing = linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    features = np.random.default_rng(1).normal(size=(300, 3)) * [1, 1, 1e-9] @ mixing
    spread = linalg.svdvals(features - features.mean(0))
    statistics = FeatureStatistics()
    for batch in np.split(features, 30):
        statistics.update(batch)
    found = linalg.svdvals(statistics.factor) * np.sqrt(299)
    np.testing.assert_allclose(found, spread, rtol=1e-6)  # the features' own rounding, 1e-16 of 1e-9
    assert abs(linalg.eigvalsh(np.cov(features, rowvar=False))[0]) > 2 * spread[2] ** 2 / 299


def test_merging_nothing_and_into_nothing():
    features = correlated(0, 30, 4)
    statistics = FeatureStatistics.of(features)
    statistics.merge(FeatureStatistics())
    assert_statistics(statistics, features)
    empty = FeatureStatistics()
    empty.merge(statistics)
    assert_statistics(empty, features)


def test_tensors_of_any_dtype_are_taken_and_not_kept():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics.of(features)
    expected = features.double().numpy().copy()
    features.zero_()
    assert_statistics(statistics, expected)
    buffer = expected.copy()  # float64 already, which needs no conversion
    statistics = FeatureStatistics()
    statistics.update(buffer[:3])
    buffer[:] = 0
    assert statistics.mean == pytest.approx(expected[:3].mean(0))
    half = torch.full((2, 3), 0.5, dtype=torch.bfloat16)
    assert FeatureStatistics.of(half).mean == pytest.approx([0.5] * 3)


def test_moments_in_moments_out():
    features = correlated(1, 40, 6)
    statistics = FeatureStatistics.from_moments(features.mean(0), np.cov(features, rowvar=False), 40)
    assert_statistics(statistics, features)
    more = correlated(2, 10, 6)
    statistics.merge(FeatureStatistics.of(more))
    assert_statistics(statistics, np.concatenate([features, more]))


def test_moments_of_few_images_have_their_rank():
    features = correlated(1, 5, 20)
    statistics = FeatureStatistics.from_moments(features.mean(0), np.cov(features, rowvar=False), 5)
    assert len(statistics.factor) == 4
    assert_statistics(statistics, features)


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (np.zeros(2), np.eye(3), 9, r"\[2\], \[3, 3\]"),
        (np.zeros(2), np.eye(2), 1, "at least 2, got 1"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), 9, "not symmetric.*0.5"),
        (np.zeros(2), np.diag([1, -0.1]), 9, "negative eigenvalue -0.1"),
        (np.array([0, np.nan]), np.eye(2), 9, "not finite"),
    ],
)
def test_moments_that_are_none(mean, covariance, count, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_moments(mean, covariance, count)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_saved_and_loaded(tmp_path, n):
    features = correlated(0, n, 4)
    statistics = FeatureStatistics.of(features, ORIGIN)
    statistics.save(tmp_path / "a.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "a.safetensors")
    assert loaded.origin == ORIGIN
    assert loaded.count == n
    assert np.array_equal(loaded.mean, statistics.mean)
    if n > 1:
        assert np.array_equal(loaded.factor, statistics.factor)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["count"] == str(n)
    assert (metadata["network"], metadata["resize"], metadata["sha256"]) == ("tiny", "none", "ab" * 32)
    loaded.update(features + 1)
    assert_statistics(loaded, np.concatenate([features, features + 1]))


def test_unknown_origin_stays_unknown(tmp_path):
    FeatureStatistics.of(np.ones((3, 2))).save(tmp_path / "a.safetensors")
    assert FeatureStatistics.load(tmp_path / "a.safetensors").origin is None


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"weights\.safetensors.*not a file of feature statistics"):
        FeatureStatistics.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors.*cannot be read"):
        FeatureStatistics.load(path)
    FeatureStatistics.of(np.ones((3, 2))).save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for damaged in ({"mean": np.zeros(3), "factor": np.zeros((2, 2))}, {"mean": np.zeros(2)}):
        save_file(damaged, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"weights\.safetensors.*is damaged"):
            FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "none.safetensors")


def test_too_few_images():
    with pytest.raises(ValueError, match="0 images; at least 1"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match="1 images; at least 2"):
        _ = FeatureStatistics.of([[1.0, 2.0]]).covariance


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(3), r"\[3\]"),
        (np.zeros((0, 3)), r"\[0, 3\]"),
        (np.zeros((2, 3, 1)), r"\[2, 3, 1\]"),
        (np.array([[1, np.nan], [np.inf, 0], [0, 0]]), "2 of 3 rows"),
        (np.zeros((2, 4)), "expected 2 features per image as before, got 4"),
    ],
)
def test_bad_features_are_refused_and_leave_the_rest(features, message):
    statistics = FeatureStatistics.of([[1.0, 2.0], [2.0, 5.0]])
    with pytest.raises(ValueError, match=message):
        statistics.update(features)
    assert statistics.count == 2


def test_features_of_different_networks_do_not_mix():
    other = FeatureOrigin(network="other", resize="none", sha256="")
    statistics = FeatureStatistics.of(np.ones((2, 2)), ORIGIN)
    with pytest.raises(ValueError, match=r"tiny.*sha256 abab.*other.*unknown.*same network"):
        statistics.merge(FeatureStatistics.of(np.ones((2, 2)), other))
    with pytest.raises(ValueError, match="expected 2 features"):
        statistics.merge(FeatureStatistics.of(np.ones((2, 3)), ORIGIN))

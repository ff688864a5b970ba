import numpy as np
import pytest
import torch

from zsnr_diffusers.evaluation import (
    CustomFeatures,
    FeatureStatistics,
    check_reference,
    frechet_distance,
    load_reference,
)


def means(images):
    return images.float().mean((2, 3))


NETWORK = CustomFeatures(means, "means", sha256="12" * 32)


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(40, 3)) @ np.diag([1, 2, 3])


@pytest.fixture
def statistics(features):
    return FeatureStatistics.of(features, NETWORK.origin)


def save_npz(path, features, **more):
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **more)
    return path


def test_our_file_says_everything(tmp_path, statistics):
    statistics.save(tmp_path / "train.safetensors")
    reference = load_reference(tmp_path / "train.safetensors")
    assert reference.name == str(tmp_path / "train.safetensors")
    assert reference.count == 40
    assert reference.origin == NETWORK.origin
    assert np.array_equal(reference.statistics.factor, statistics.factor)
    check_reference(reference, NETWORK)


@pytest.mark.filterwarnings("ignore:3 images for 3 features:UserWarning")
@pytest.mark.parametrize("n", [40, 3])
def test_npz_gives_the_same_distance_without_count_and_origin(tmp_path, n, features):
    """Of no more images than features too, whose covariance is singular."""
    reference = load_reference(save_npz(tmp_path / "a.npz", features[:n], label=0))
    assert reference.count is None
    assert reference.origin is None
    other = FeatureStatistics.of(np.random.default_rng(1).normal(size=(9, 3)))
    expected = frechet_distance(FeatureStatistics.of(features[:n]), other)
    # A covariance is rounded to 1e-16, its root to 1e-8.
    assert frechet_distance(reference.statistics, other) == pytest.approx(expected, rel=1e-7)
    check_reference(reference, NETWORK)


def test_reference_of_another_network(tmp_path, statistics, features):
    statistics.save(tmp_path / "a.safetensors")
    other = CustomFeatures(means, "others")
    with pytest.raises(ValueError, match=r"a\.safetensors.*means.*others.*same network"):
        check_reference(load_reference(tmp_path / "a.safetensors"), other)
    wider = CustomFeatures(lambda images: torch.cat([means(images)] * 2, 1), "wider")
    with pytest.raises(ValueError, match=r"a\.npz' has 3 features.*wider.* has 6"):
        check_reference(load_reference(save_npz(tmp_path / "a.npz", features)), wider)


def test_files_that_are_no_reference(tmp_path, features):
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path / "none.npz")
    for content in (b"", b"not a zip", b"\x93NUMPY"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz' cannot be read"):
            load_reference(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), features=features)
    with pytest.raises(ValueError, match=r"a\.npz' has no sigma, only \['features', 'mu'\]"):
        load_reference(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"a\.npz': expected mean \[d\]"):
        load_reference(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", mu=np.array([None]), sigma=np.eye(1))  # a pickle
    with pytest.raises(ValueError, match=r"a\.npz' cannot be read"):
        load_reference(tmp_path / "a.npz")

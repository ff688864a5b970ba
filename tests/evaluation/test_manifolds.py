import numpy as np
import pytest

from zsnr_diffusers.evaluation import precision_recall


def by_hand(generated, real, k):
    """The two equations of the paper, point by point."""

    def share(points, centers):
        inside = 0
        for point in points:
            for i, center in enumerate(centers):
                others = sorted(np.linalg.norm(center - other) for j, other in enumerate(centers) if j != i)
                if np.linalg.norm(point - center) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_paper_s_equations(k):
    rng = np.random.default_rng(0)
    generated, real = rng.normal(size=(30, 3)), rng.normal(2.0, 1.3, size=(40, 3))
    found = precision_recall(generated, real, k)
    assert (found.precision, found.recall) == pytest.approx(by_hand(generated, real, k))
    assert (found.n, found.m, found.k) == (30, 40, k)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    generated, real = rng.normal(size=(50, 2)), rng.normal(size=(60, 2))
    whole = precision_recall(generated, real)
    monkeypatch.setattr("zsnr_diffusers.evaluation.manifolds.BLOCK", 7)
    assert precision_recall(generated, real) == whole


def test_too_narrow_is_precise_too_wide_has_recall():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 2))
    narrow = precision_recall(0.1 * rng.normal(size=(400, 2)), real)
    assert narrow.precision > 0.95
    assert narrow.recall < 0.2
    wide = precision_recall(8 * rng.normal(size=(400, 2)), real)
    assert wide.precision < 0.2
    assert wide.recall > 0.8
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)
    far = precision_recall(real + 100, real)
    assert (far.precision, far.recall) == (0, 0)


@pytest.mark.parametrize(
    ("n", "d", "k", "message"), [(3, 2, 3, "at least 4 images"), (9, 3, 3, "features"), (9, 2, 0, "k must be")]
)
def test_what_makes_no_sense_is_refused(n, d, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(np.zeros((n, d)), np.ones((9, 2)), k)

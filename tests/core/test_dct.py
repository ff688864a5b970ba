import math

import pytest
import torch

from zsnr_diffusers.core.dct import dct, dct_basis, inverse_dct

X = torch.randn(2, 3, 6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("side", [1, 2, 5, 8, 64, 97])
def test_rows_are_orthonormal_cosines(side):
    basis = dct_basis(side, side, X)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(side, dtype=X.dtype), rtol=0, atol=1e-13)
    if side > 1:
        expected = math.sqrt(2 / side) * torch.cos(math.pi * (torch.arange(side, dtype=X.dtype) + 0.5) / side)
        torch.testing.assert_close(basis[1], expected, rtol=0, atol=1e-13)


def test_no_more_frequencies_than_values():
    assert dct_basis(3, 8, X).shape == (3, 3)
    assert dct(X, (9, 9)).shape == (2, 3, 6, 5, 7)


def test_all_of_them_are_another_basis():
    torch.testing.assert_close(inverse_dct(dct(X, (6, 5, 7)), (6, 5, 7)), X, rtol=0, atol=1e-13)


def test_each_axis_has_its_own_frequency():
    wave = torch.outer(dct_basis(5, 5, X)[2], dct_basis(7, 7, X)[1])
    found = dct(wave, (4, 3))
    expected = torch.zeros(4, 3, dtype=X.dtype)
    expected[2, 1] = 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_inverse_is_the_transpose():
    y = torch.randn(2, 3, 6, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there = (dct(X, (2, 3)) * y).sum()
    torch.testing.assert_close(there, (X * inverse_dct(y, (5, 7))).sum(), rtol=1e-12, atol=0)

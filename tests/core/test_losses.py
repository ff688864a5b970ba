import pytest
import torch

from zsnr_diffusers.core import v_loss


def test_each_sample_has_its_own_mean_squared_error_in_float32():
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    loss = v_loss(output, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [5.0, 2.0]


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        v_loss(torch.ones(2, 3), torch.ones(2, 1))

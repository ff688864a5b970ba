import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from zsnr_diffusers.training.checkpointing import tensor_file
from zsnr_diffusers.training.checkpointing.tensor_file import write_tensor_file

DTYPES = list(tensor_file._DTYPES)


def written(tensors, folder):
    facts = write_tensor_file(folder / "ours", tensors)
    content = (folder / "ours").read_bytes()
    assert facts == (len(content), hashlib.sha256(content).hexdigest())
    return content


def test_a_file_is_the_library_s_own_byte_for_byte(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{dtype} {'é' * n}": torch.randn(n, 3, generator=draw).to(dtype) for dtype in DTYPES for n in range(3)}
    tensors |= {"step": torch.tensor(3.0), 'a "quoted" name': torch.ones(2, 1, 2)}
    save_file(tensors, tmp_path / "theirs")
    assert written(tensors, tmp_path) == (tmp_path / "theirs").read_bytes()


def test_an_empty_file_is_read(tmp_path):
    written({}, tmp_path)
    assert load_file(tmp_path / "ours") == {}


@pytest.mark.parametrize("part", [lambda t: t, lambda t: t[1:], lambda t: t.mT, lambda t: t[:, ::2]])
def test_any_layout_and_shared_memory_are_written(tmp_path, part):
    whole = torch.arange(24.0).reshape(1, 4, 6)[0]
    tensors = {"whole": whole, "part": part(whole), "parameter": torch.nn.Parameter(part(whole))}
    written(tensors, tmp_path)
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_a_dtype_that_the_format_may_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensor_file(tmp_path / "ours", {"a": torch.zeros(1, dtype=torch.complex64)})

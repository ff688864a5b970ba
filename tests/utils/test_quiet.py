import os

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as auto

from zsnr_diffusers.utils.quiet import quietly


@pytest.mark.parametrize("bar", [tqdm, auto])
def test_no_bar_whatever_it_asks_for(bar, capsys):
    with quietly():
        assert [*bar(range(3), disable=False)] == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert [*bar(range(3), disable=False)] == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    with quietly(False):
        assert [*bar(range(3), disable=False)] == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


def test_what_was_set_for_libraries_stays(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    with quietly():
        assert (os.environ["DIFFUSERS_VERBOSITY"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("info", "error")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "info"
    assert "TRANSFORMERS_VERBOSITY" not in os.environ

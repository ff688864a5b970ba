import io
import json
import sys

import pytest
from quickstart_progress import WIDTH, Part, run_parts


def test_progress_is_one_line_with_the_time_left_and_what_is_printed_goes_to_a_log(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)

    def first(advance):
        print("chatter")
        advance(0.5)

    parts = [Part("first", 1, first), Part("the second", 3, lambda advance: advance(1))]
    run_parts(parts, tmp_path / "record.json", {"seed": 0})
    lines = terminal.getvalue().split("\r")
    assert terminal.getvalue().count("\n") == 1
    assert all(len(line.rstrip("\n")) <= WIDTH for line in lines)
    assert lines[-1].startswith("the second 100 % |")
    assert lines[-1].rstrip().endswith("left")
    assert any(line.startswith("the second  25 % |") for line in lines)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "record.log").read_text() == "chatter\n"


def test_what_was_finished_before_an_interruption_is_not_run_again(tmp_path, capsys):
    run = []

    def interrupted(advance):
        raise KeyboardInterrupt

    first = Part("first", 1, lambda advance: run.append("first"))
    with pytest.raises(KeyboardInterrupt):
        run_parts([first, Part("second", 1, interrupted)], tmp_path / "record.json", {"seed": 0})
    assert [*json.loads((tmp_path / "record.json").read_text())["seconds"]] == ["first"]
    capsys.readouterr()
    second = Part("second", 1, lambda advance: run.append("second"))
    run_parts([first, second], tmp_path / "record.json", {"seed": 0})
    assert run == ["first", "second"]
    assert capsys.readouterr().err == "  0%  second\n"  # no terminal: a line for each part
    run_parts([first, second], tmp_path / "record.json", {"seed": 0})
    assert capsys.readouterr().err == ""

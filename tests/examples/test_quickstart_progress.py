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

    parts = [Part("first", 1, first, tmp_path), Part("the second", 3, lambda advance: advance(1), tmp_path)]
    run_parts(parts, tmp_path / "record.json", {"seed": 0})
    lines = terminal.getvalue().split("\r")
    assert terminal.getvalue().count("\n") == 1
    assert all(len(line.rstrip("\n")) <= WIDTH for line in lines)
    assert lines[-1].startswith("the second 100 % |")
    assert lines[-1].rstrip().endswith("left")
    assert any(line.startswith("the second  25 % |") for line in lines)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "record.log").read_text() == "chatter\n"


def test_what_was_finished_before_an_interruption_and_is_still_there_is_not_run_again(tmp_path, capsys):
    record, made = tmp_path / "record.json", [tmp_path / "first", tmp_path / "second"]

    def interrupted(advance):
        raise KeyboardInterrupt

    first, second = (Part(path.name, 1, lambda advance, path=path: path.touch(), path) for path in made)
    with pytest.raises(KeyboardInterrupt):
        run_parts([first, Part("second", 1, interrupted, made[1])], record, {"seed": 0})
    assert [*json.loads(record.read_text())["seconds"]] == ["first"]
    capsys.readouterr()
    run_parts([first, second], record, {"seed": 0})
    assert capsys.readouterr().err == "  0%  second\n"  # no terminal: a line for each part
    run_parts([first, second], record, {"seed": 0})
    assert capsys.readouterr().err == ""
    made[0].unlink()
    run_parts([first, second], record, {"seed": 0})
    assert capsys.readouterr().err == "  0%  first\n"
    assert made[0].exists()

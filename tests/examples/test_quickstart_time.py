import sys
import time

import pytest
import quickstart_time


def test_a_core_is_busy_inside_the_context_and_free_after_it():
    with quickstart_time.busy_core() as loop:
        time.sleep(0.1)
        assert loop.poll() is None
    assert loop.poll() is not None


@pytest.mark.parametrize("mode", ["latent", "pixels"])
def test_prints_the_seconds_of_each_part_idle_and_busy(mode, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "quickstart.py"
    fake.write_text(
        "import argparse, json, pathlib\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--mode')\n"
        "parser.add_argument('--output_dir', type=pathlib.Path)\n"
        "args = parser.parse_args()\n"
        "record = {'latent': 'progress.json', 'pixels': 'progress-pixels.json'}[args.mode]\n"
        "(args.output_dir / record).write_text(json.dumps({'seconds': {'training': 41.5}}))\n"
    )
    monkeypatch.setattr(quickstart_time, "QUICKSTART", fake)
    monkeypatch.setattr(quickstart_time, "pin", lambda cores: None)
    monkeypatch.setattr(sys, "argv", ["quickstart_time.py", "--mode", mode])
    quickstart_time.main()
    head, training, whole = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-2:] == ["idle", "busy"]
    assert training.split() == ["training", "41.5", "41.5"]
    assert whole.startswith("the whole process")

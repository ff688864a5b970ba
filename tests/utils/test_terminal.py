"""What the commands draw on a terminal, beside what they write into a pipe."""

import json
import os
import re
import subprocess
import sys

import pytest
from command_line import fill
from pseudo_terminal import BOX, ENVIRONMENT, on_terminal, terminal
from tiny_pipelines import tiny_stable_diffusion

from zsnr_diffusers import audit
from zsnr_diffusers.cli import main
from zsnr_diffusers.evaluation.feature_statistics import FeatureOrigin
from zsnr_diffusers.evaluation.metrics import Figure, Figures
from zsnr_diffusers.utils.tables import KeyValues, Note, Remarks, Report, Table, Text
from zsnr_diffusers.utils.terminal import show

NAME = "[red]model[/red] :cat: [0]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a pipeline that is set up wrong, called `NAME`, and folders of images."""
    folder = tmp_path_factory.mktemp("terminal")
    tiny_stable_diffusion().save_pretrained(folder / NAME)
    path = folder / NAME / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "timestep_spacing": "leading", "set_alpha_to_one": False}))
    fill(folder / "real", [0, 51, 102, 255])
    fill(folder / "generated", [51, 102, 153, 102])
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def calls(target):
    """Of each command, and its exit status; the checkpoint of one is written to a target."""
    return [
        (["audit", NAME], 1),
        (["evaluate", "--real", "real", "--generated", "generated"], 0),
        (["convert", NAME, target], 0),
    ]


def words(text):
    return set(re.findall(r"[\w.-]*\w", text))


def codes(screen):
    """Numbers of colours and the like that were asked for."""
    return {int(number) for code in re.findall(r"\x1b\[([0-9;]+)m", screen.raw) for number in code.split(";")}


def code_lines(result):
    """What of an audit's advice is to be copied."""
    lines = [line for finding in result.findings for line in finding.remedy.splitlines()]
    return [line for line in lines if not line.endswith(":")]


@pytest.mark.full
def test_three_commands_on_a_terminal_and_in_a_pipe(folder, inside, capsys):
    script = "from zsnr_diffusers.cli import main\nfor call in {}: assert main(call[0]) == call[1]"
    command = [sys.executable, "-c", script.format(calls("drawn.safetensors"))]
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"TERM": "xterm"}
    with terminal(60) as (descriptor, screen):
        done = subprocess.run(command, env=environment, stdout=descriptor, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert sum({*line} == {BOX} for line in screen.lines) == 4  # two tables of an audit, one of each other command
    code = code_lines(audit(NAME))
    assert max(map(len, code)) > 80
    assert {*code} < {*screen.lines}
    assert max(len(line) for line in screen.lines if line not in code) <= 60
    assert {NAME + ", StableDiffusionPipeline", "verdict: misconfigured"} < {*screen.lines}

    assert [main(call) for call, _ in calls("piped.safetensors")] == [status for _, status in calls("")]
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert BOX not in text
    assert text.splitlines()[1] == "  scheduler             DDIMScheduler, rescale_betas_zero_snr=True"
    assert text.splitlines()[-1] == (
        "piped.safetensors: StableDiffusionPipeline, prediction_type=v_prediction, rescale_betas_zero_snr=True, "
        "guidance_rescale=0.0"
    )
    assert words(text) - {"piped.safetensors"} <= words(screen.text)  # nothing is lost at 60 columns


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_code_is_whole_at_every_width(columns, inside, monkeypatch):
    result = audit(NAME)
    screen = on_terminal(monkeypatch, columns, lambda: show(result))
    assert {*code_lines(result)} < {*screen.lines}


def test_colours_say_how_bad_it_is(inside, monkeypatch):
    screen = on_terminal(monkeypatch, 80, lambda: show(audit(NAME)))
    assert "\x1b[1;31merror" in screen.raw
    assert "\x1b[1;31mverdict: misconfigured" in screen.raw
    assert "\x1b[2mnote" in screen.raw
    assert "\x1b[1;32mverdict: OK" in on_terminal(monkeypatch, 80, lambda: show(Right())).raw


class Right(Report):
    def parts(self):
        return [Text("verdict: OK", "good")]


def test_without_colours(inside, monkeypatch):
    def call():
        show(audit(NAME))

    plain = on_terminal(monkeypatch, 80, call, NO_COLOR="1")
    assert codes(plain) <= {0, 1, 2}  # bold and dim are no colours
    assert plain.text == on_terminal(monkeypatch, 80, call).text


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_terminal_that_cannot_draw_has_the_text(name, inside, monkeypatch):
    result = audit(NAME)
    assert on_terminal(monkeypatch, 80, lambda: show(result), TERM=name).raw == f"{result}\n"


def test_a_terminal_of_ascii_loses_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "modèle").symlink_to(NAME)
    screen = on_terminal(monkeypatch, 80, lambda: main(["audit", "modèle"]), encoding="ascii")
    assert screen.text.isascii()
    assert r"mod\xe8le, StableDiffusionPipeline" in screen.lines
    assert "guidance rescale      |not recorded" in screen.text
    plain = on_terminal(monkeypatch, 80, lambda: main(["audit", "modèle"]), encoding="ascii", TERM="dumb")
    assert plain.lines[0] == screen.lines[0]


def test_help_can_be_read_in_ascii(monkeypatch):
    def call():
        with pytest.raises(SystemExit):
            main(["evaluate", "--help"])

    assert r"Fr\xe9chet distance" in on_terminal(monkeypatch, 80, call, encoding="ascii").text


NUMBERS = Table(("", *"abcdefgh"), (("one", *["-0.1234"] * 8), ("two", *["12345.6789"] * 8)), "<" + ">" * 8)


def test_a_table_that_is_too_wide_is_turned_with_its_numbers_whole(monkeypatch):
    class Numbers(Report):
        def parts(self):
            return [NUMBERS]

    wide, narrow = (on_terminal(monkeypatch, columns, lambda: show(Numbers())) for columns in (120, 60))
    assert [line.split() for line in wide.lines[2:4]] == [[*row] for row in NUMBERS.rows]
    assert narrow.lines[0].split() == ["one", "two"]
    assert [line.split() for line in narrow.lines[2:10]] == [[c, "-0.1234", "12345.6789"] for c in "abcdefgh"]


def test_figures_stand_in_one_table_with_what_they_depend_on(monkeypatch):
    origin = FeatureOrigin("inception [0]", "TensorFlow 1 bilinear to 299", "f00d" * 16)
    figures = Figures(tuple(Figure(name, 1.5, origin, 100, error=0.25, method="jackknife") for name in ("FID", "KID")))
    screen = on_terminal(monkeypatch, 120, lambda: show(figures))
    assert screen.lines[0].split("  ")[0] == "figure"
    assert BOX in screen.lines[1]
    assert screen.lines[2] == "FID     1.5 ± 0.25  " + figures.figures[0].row[-1]
    assert words(str(figures)) <= words(screen.text)


def test_a_column_without_anything_in_it_is_left_out(monkeypatch):
    class One(Report):
        def parts(self):
            yield KeyValues(("made", "a", "right"), (("b", "c", ""),))
            yield Remarks((Note("note", "d", "f(x)", "quiet"),))

    screen = on_terminal(monkeypatch, 40, lambda: show(One()))
    assert screen.lines[0].split() == ["made", "a"]
    assert screen.lines[2].split() == ["b", "c"]
    assert screen.lines[4:6] == ["note  d", "f(x)"]


def test_what_is_longer_than_its_column_goes_on_below(monkeypatch):
    long = "/".join(map(str, range(1000, 1020)))

    class Long(Report):
        def parts(self):
            yield KeyValues(("", "this model"), (("path", long),))
            yield Table((), (("path", long),), align="<<")
            yield Remarks((Note("note", long, "f(x)", "quiet"),))

    screen = on_terminal(monkeypatch, 40, lambda: show(Long()))
    drawn = "".join(screen.lines).replace(BOX, "").replace(" ", "")
    assert drawn == f"thismodelpath{long}path{long}note{long}f(x)"

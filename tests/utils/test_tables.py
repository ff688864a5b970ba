import pytest

from zsnr_diffusers.utils.tables import KeyValues, Note, Remarks, Report, Table, Text, one_line


class Weather(Report):
    def parts(self):
        yield Text("today", "title")
        yield KeyValues(
            ("", "here", "right"), (("sun", "no", "yes"), ("clouds", "all", "")), " (right: {})", indent="  "
        )
        yield Table(("", "hours", "where"), (("rain", "12", "here"), ("snow", "0", "there, {}")), align="<><")
        yield Remarks((Note("bad", "wet", "outside:\nput on a hat", "bad"), Note("note", "it dries", "wait", "quiet")))


def test_text_of_a_report():
    assert str(Weather()) == "\n".join(
        [
            "today",
            "  sun    no (right: yes)",
            "  clouds all",
            "      hours  where",
            "rain     12  here",
            "snow      0  there, {}",
            "bad   wet",
            "      -> outside: put on a hat",
            "note  it dries",
            "      -> wait",
        ]
    )


def test_a_sentence_is_a_report():
    assert str(Text("dark")) == "dark"
    assert list(Text("dark").parts()) == [Text("dark")]


@pytest.mark.parametrize(
    ("advice", "line"),
    [
        ("f(x)", "f(x)"),
        ("in half precision:\nf(x)", "in half precision: f(x)"),
        (
            "a v-prediction model:\nf(x)\nof epsilon:\ng(x)\nand:\nh",
            "a v-prediction model: f(x); of epsilon: g(x); and: h",
        ),
        ("f(x)\nor:\ng(x)", "f(x); or: g(x)"),
    ],
)
def test_advice_in_one_line(advice, line):
    assert one_line(advice) == line

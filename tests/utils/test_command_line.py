import pytest

from zsnr_diffusers.utils.command_line import CommandParser, arguments_as_options, nearest


@pytest.fixture
def parser():
    parser = CommandParser("tool")
    parser.add_switch(parser, "zero_snr", "its schedule", aliases=("ztsnr",))
    parser.add_argument("--num_images", type=int)
    parser.add_argument("--config")
    parser.add_argument("--device")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("names", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", None),
        *((f"--zero_snr {word}", word in ("yes", "true", "1")) for word in ("yes", "true", "1", "no", "false", "0")),
        ("--zero_snr", True),
        ("--zero-snr", True),
        ("--ztsnr=no", False),
        ("--no_zero_snr", False),
        ("--no-ztsnr", False),
    ],
)
def test_a_switch_by_all_its_spellings(parser, line, value):
    assert parser.parse_args(line.split()).zero_snr is value


@pytest.mark.parametrize("line", ["--ztsnr a b", "a b --zero-snr", "--zero_snr yes a b", "--zero_snr -- a b"])
def test_a_switch_takes_no_name_for_its_value(parser, line):
    arguments = parser.parse_args(line.split())
    assert (arguments.zero_snr, arguments.names) == (True, ["a", "b"])


def test_dashes_are_underscores_in_names_and_stay_in_values(parser):
    arguments = parser.parse_args(["--num-images=3", "--config", "my-config", "a-b"])
    assert (arguments.num_images, arguments.config, arguments.names) == (3, "my-config", ["a-b"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--zero_snr --no_zero_snr", "not allowed with"),
        ("--zero_snr=maybe", "maybe is neither yes nor no"),
        ("--num_imges 3", "unknown option --num_imges; did you mean --num_images?"),
        ("--num_images", "expected one argument"),
        ("--nothing_like_it", "unknown option --nothing_like_it\n"),
        ("-x", "unknown option -x\n"),
    ],
)
def test_what_is_refused(parser, line, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tool: error: ")
    assert said in error
    assert error.endswith("\nhelp: tool --help\n")


def test_numbers_below_zero_are_values(parser):
    assert parser.parse_args(["--num_images", "-3"]).num_images == -3


def test_other_spellings_are_not_in_the_help(parser):
    assert "--zero_snr [yes|no]" in parser.format_help()
    assert "ztsnr" not in parser.format_help()
    assert "--no_zero_snr" not in parser.format_help()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("it is there; pass overwrite=True.", "it is there; pass --overwrite."),
        ("Pass config=, a folder of it.", "Pass --config, a folder of it."),
        ("pass device='cpu' or zero_snr=False", "pass --device cpu or --no_zero_snr"),
        ("pass zero_snr= as it was trained", "pass --zero_snr or --no_zero_snr as it was trained"),
        ("num_images=0 must be at least 1.", "--num_images 0 must be at least 1."),
        ("num_images=-1 must be at least 1.", "--num_images -1 must be at least 1."),
        ("config=['a', 'b'] is none", "config=['a', 'b'] is none"),
        ("log in, or pass token=.", "log in."),
        ("log in, or pass config=.", "log in, or pass --config."),
        ("pass eta=1.0 to it", "pass eta=1.0 to it"),
        ("--num_images=0 must be above 0", "--num_images=0 must be above 0"),
        ("Scheduler.from_config(config=x)", "Scheduler.from_config(config=x)"),
        ("pass device=None", "pass device=None"),
    ],
)
def test_errors_speak_of_options(parser, text, told):
    assert arguments_as_options(text, parser) == told


def test_the_nearest_name_whatever_its_case():
    assert nearest("ddimscheduler", ["DDIMScheduler", "DDPMScheduler"]) == ["DDIMScheduler"]
    assert nearest("xyz", ["DDIMScheduler"]) == []

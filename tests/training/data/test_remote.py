import os
from importlib.util import find_spec

import fsspec
import pytest
from tar_shards import FlakyFileSystem, serve_ranges

from zsnr_diffusers.training.data import remote
from zsnr_diffusers.training.data.remote import (
    RangeReader,
    ShardError,
    expand_braces,
    file_state,
    read_range,
    resolve_urls,
)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Seconds that were waited, none of them real."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    monkeypatch.setattr(FlakyFileSystem, "errors", [])
    return waited


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..3}", ["3"]),
        ("{3..2}", []),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
    ],
)
def test_braces(pattern, expanded):
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{0..3", "0}.tar", "{a{0..1},b}"])
def test_braces_that_do_not_pair(pattern):
    with pytest.raises(ShardError, match="unmatched or nested braces"):
        expand_braces(pattern)


def test_globs_are_sorted_and_braces_kept_in_order(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_urls(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert resolve_urls(f"{tmp_path}/{{b,a}}.tar") == [f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"]
    fsspec.filesystem("memory").pipe("/glob/a.tar", b"x")
    (url,) = resolve_urls("memory://glob/?.tar")
    assert read_range(url, 0, 1) == b"x"


@pytest.mark.parametrize("pattern", ["{}/*.zip", "{}/{{3..2}}.tar"])
def test_a_pattern_without_files(tmp_path, pattern):
    with pytest.raises(ShardError, match="no file matches"):
        resolve_urls(pattern.format(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/0.tar", "no such file"),
        ("/nowhere/0.tar", "no such file"),
        ("nonsense://bucket/0.tar", "Protocol not known"),
    ],
)
def test_a_missing_file_is_named_at_once(url, message, pauses):
    with pytest.raises(ShardError, match=f"{url} cannot be read: .*{message}"):
        file_state(url)
    assert pauses == []


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_file_written_anew_with_the_same_size_is_in_another_state(protocol, tmp_path, pauses):
    system, path = fsspec.filesystem(protocol), f"{tmp_path}/a.tar"
    states = []
    for content, seconds in ((b"one", 1), (b"two", 2)):
        system.makedirs(str(tmp_path), exist_ok=True)
        system.pipe(path, content)
        if protocol == "file":
            os.utime(path, (seconds, seconds))  # clocks of file systems are coarse
        states.append(file_state(f"{protocol}://{path}"))
        assert states[-1] == file_state(f"{protocol}://{path}")
    assert states[0].size == states[1].size == 3
    assert states[0].sha256 != states[1].sha256


def test_what_fails_is_tried_again(monkeypatch, pauses):
    fsspec.filesystem("flaky").pipe("/a.tar", b"0123456789")
    monkeypatch.setattr(FlakyFileSystem, "errors", [OSError("reset"), FileNotFoundError("a.tar"), None])
    assert read_range("flaky://a.tar", 3, 6) == b"345"
    assert pauses == list(remote.RETRY_DELAYS[:2])


def test_what_goes_on_failing_is_named(monkeypatch, pauses):
    fsspec.filesystem("flaky").pipe("/a.tar", b"0123456789")
    monkeypatch.setattr(FlakyFileSystem, "errors", [RuntimeError("500,\nServer error")])
    with pytest.raises(ShardError, match=r"^flaky://a.tar cannot be read: 500, Server error$"):
        read_range("flaky://a.tar", 3, 6)
    assert pauses == list(remote.RETRY_DELAYS)


def test_other_bytes_than_those_asked_for_are_refused():
    fsspec.filesystem("memory").pipe("/short.tar", b"0123456789")
    with pytest.raises(
        ShardError, match=r"the server returned 2 bytes for the range 8 to 12: the file has become shorter"
    ):
        read_range("memory://short.tar", 8, 12)


def test_over_http(tmp_path, pauses):
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    (tmp_path / "a.tar").write_bytes(bytes(range(100)))
    asked = []

    def answer(name, start):
        asked.append(start)
        return {50: 500, 60: "whole"}.get(start)

    with serve_ranges(tmp_path, answer) as place:
        assert file_state(f"{place}/a.tar").size == 100
        assert read_range(f"{place}/a.tar", 10, 20) == bytes(range(10, 20))
        with pytest.raises(ShardError, match=r"a\.tar cannot be read: .*500"):
            read_range(f"{place}/a.tar", 50, 51)
        assert asked.count(50) == 1 + len(remote.RETRY_DELAYS) == 1 + len(pauses)
        with pytest.raises(
            ShardError, match=r"returned 100 bytes for the range 60 to 61: .*the server does not support ranges"
        ):
            read_range(f"{place}/a.tar", 60, 61)
        with pytest.raises(ShardError, match=r"b\.tar cannot be read: no such file"):
            file_state(f"{place}/b.tar")


@pytest.mark.skipif(find_spec("aiohttp") is not None, reason="HTTP can be read")
def test_a_missing_library_is_named():
    with pytest.raises(ShardError, match='"requests" and "aiohttp" to be installed'):
        file_state("http://127.0.0.1/a.tar")


@pytest.mark.parametrize(("window", "sizes"), [(0, [3, 2, 5]), (6, [6, 5])])
def test_a_reader_reads_what_is_asked_for_or_a_window(window, sizes, monkeypatch):
    fsspec.filesystem("flaky").pipe("/a.tar", b"0123456789")
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    reader = RangeReader("flaky://a.tar", 10, window)
    assert (reader.readable(), reader.seekable(), reader.tell()) == (True, True, 0)
    assert reader.read(3) == b"012"
    assert (reader.read(2), reader.tell()) == (b"34", 5)
    assert reader.seek(0, 1) == reader.seek(5) == reader.seek(-5, 2) == 5
    assert (reader.read(), reader.read(), reader.read(1)) == (b"56789", b"", b"")
    assert FlakyFileSystem.reads == sizes

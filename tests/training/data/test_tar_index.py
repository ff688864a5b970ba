import io
import pickle
import tarfile

import fsspec
import pytest
from tar_shards import FlakyFileSystem, tar

from zsnr_diffusers.training.data import remote, tar_index
from zsnr_diffusers.training.data.remote import FileState, ShardError
from zsnr_diffusers.training.data.tar_index import TarIndex, index_path, read_index

TEXT = ("txt", "json")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS", ())


def index_of(data, captions=TEXT, protocol="memory"):
    fsspec.filesystem(protocol).pipe("/index.tar", data)
    return read_index(f"{protocol}://index.tar", len(data), captions)


def cut(data, place):
    return [data[offset : offset + size] for offset, size in place.reshape(2, 2).tolist()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_it_says(format):
    long = "folder/" + "n" * (80 if format == tarfile.USTAR_FORMAT else 300)
    data = tar({"a.jpg": b"A" * 700, "a.txt": b"first", f"{long}.png": b"B", f"{long}.txt": b"second"}, format)
    index = index_of(data)
    assert [cut(data, place) for place in index.places] == [[b"A" * 700, b"first"], [b"B", b"second"]]
    assert index.names == [("a.jpg", "a.txt"), (f"{long}.png", f"{long}.txt")]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # the library's own reading
        offsets = {member.name: member.offset_data for member in archive.getmembers()}
    assert index.places[1, 0] == offsets[f"{long}.png"]


def test_what_a_sample_is():
    index = index_of(
        tar(
            [
                ("README.md", b"about"),
                ("._a.jpg", b"of a Mac"),
                ("a.cls", b"3"),
                ("a.WEBP", b"image"),
                ("a.json", b"{}"),
                ("a.txt", b"text"),
                ("b.json", b"{}"),
                ("b.orig.jpg", b"image"),
                ("x/c.txt", b"no image"),
                ("y/c.jpg", b"no caption"),
                ("d.pkl", pickle.dumps("never read")),
                ("d.jpg", b"image"),
                ("d.pyd", b""),
            ]
        )
    )
    assert index.names == [("a.WEBP", "a.txt"), ("b.orig.jpg", "b.json")]
    assert index.incomplete == ["x/c (no image)", "y/c (no caption)", "d (no caption)"]


def test_captions_may_be_of_one_kind_or_not_needed():
    data = tar({"a.jpg": b"", "a.json": b"{}", "a.txt": b"", "b.jpg": b"", "b.txt": b""})
    assert index_of(data, ["json"]).names == [("a.jpg", "a.json")]
    alone = index_of(data, [])
    assert alone.names == [("a.jpg", ""), ("b.jpg", "")]
    assert alone.incomplete == []


def test_images_are_not_read(monkeypatch):
    monkeypatch.setattr(FlakyFileSystem, "reads", [])
    data = tar({f"{i}.{ending}": b"x" * size for i in range(8) for ending, size in (("jpg", 300_000), ("txt", 50))})
    assert len(index_of(data, protocol="flaky")) == 8
    assert len(FlakyFileSystem.reads) <= 8 + 2  # one for a sample, since the next header lies beside a caption
    assert sum(FlakyFileSystem.reads) < 0.07 * len(data)


def test_a_tar_that_is_cut_off_anywhere_is_refused():
    data = tar({f"{i}.{ending}": b"x" * 700 for i in range(3) for ending in ("jpg", "txt")})
    content = len(data.rstrip(b"\0")) + (-len(data.rstrip(b"\0"))) % 512  # then come zeros alone
    for length in (*range(0, content, 100), content, content + 511):
        with pytest.raises(ShardError, match=r"memory://index\.tar is not a complete tar"):
            index_of(data[:length])
    whole = index_of(data)
    assert len(whole) == 3
    assert index_of(data[: content + 512]).sha256 == whole.sha256


@pytest.mark.parametrize("data", [b"no tar at all" * 100, b"\x1f\x8b" + b"\0" * 2000])
def test_something_else_is_refused(data):
    with pytest.raises(ShardError, match="is not a complete tar"):
        index_of(data)


def test_stored_and_loaded(tmp_path):
    index = index_of(tar({"a.jpg": b"1", "a.txt": b"2", "b.jpg": b"3"}))
    file = index_path(tmp_path / "new", "memory://index.tar", FileState(5, "a"), TEXT)
    assert TarIndex.load(file) is None
    index.save(file)
    loaded = TarIndex.load(file)
    assert loaded.sha256 == index.sha256
    assert loaded.names == index.names == [("a.jpg", "a.txt")]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    whole = file.read_bytes()
    for damaged in (b"", whole[:-30], whole[:60], b"PK\x03\x04 nonsense", pickle.dumps({"places": 1})):
        file.write_bytes(damaged)
        assert TarIndex.load(file) is None


def test_what_an_index_is_of():
    files = {
        index_path(tar_index.Path("f"), url, FileState(size, version), kinds)
        for url in ("a", "b")
        for size in (1, 2)
        for version in ("1", "2")
        for kinds in (TEXT, ["json"])
    }
    assert len(files) == 16


def test_hash_of_an_index():
    members = {"a.jpg": b"1", "a.txt": b"2"}
    same = index_of(tar(members)).sha256
    assert same == index_of(tar({**members, "z.md": b"after all samples"})).sha256
    others = [{"b.jpg": b"1", "b.txt": b"2"}, {"a.jpg": b"12", "a.txt": b"2"}, {**members, "b.jpg": b""}]
    assert len({same, *(index_of(tar(other)).sha256 for other in others)}) == 4

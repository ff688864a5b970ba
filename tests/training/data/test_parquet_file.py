"""Footers and row groups of parquet files, read by range."""

from pathlib import Path

import fsspec
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
from parquet_shards import table, write
from tar_shards import FlakyFileSystem, serve_ranges

from zsnr_diffusers.training.data import parquet_file
from zsnr_diffusers.training.data.parquet_file import (
    ParquetFooter,
    Source,
    find_source,
    read_footer,
    read_row_group,
)
from zsnr_diffusers.training.data.remote import ShardError, file_state

SAMPLES = [(f"{number}", bytes([number]) * 1000, f"caption {number}") for number in range(10)]

pytestmark = pytest.mark.usefixtures("reads")


def footer_of(url):
    return read_footer(str(url), file_state(str(url)).size)


def flaky(tmp_path, content, groups):
    """The footer of a table that lies where reads are counted."""
    data = Path(write(tmp_path / "a.parquet", content, groups)).read_bytes()
    fsspec.filesystem("flaky").pipe("/a.parquet", data)
    return footer_of("flaky://a.parquet")


def read(footer, number, **columns):
    """The values of columns by the options that name them."""
    sources = {option: find_source(footer, option, column) for option, column in columns.items()}
    found = pyarrow.Table.from_batches(read_row_group(footer, number, sources))
    assert [field.type for field in found.schema] == [source.type for source in sources.values()]
    return found.to_pydict()


def one_column(tmp_path, values, name="text"):
    """The footer of a file with one column in one row group."""
    file = tmp_path / "column.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: values}), file)
    return footer_of(file)


# -- footers


def test_a_footer_is_one_read_or_two(tmp_path, reads, monkeypatch):
    footer = flaky(tmp_path, table(SAMPLES), (4, 6))
    assert reads == [footer.size]  # a file smaller than what is read first
    assert footer.metadata.num_row_groups == 2
    assert footer.schema.names == ["image", "text"]
    reads.clear()
    monkeypatch.setattr(parquet_file, "_TAIL", 100)
    assert footer_of("flaky://a.parquet").data == footer.data
    assert reads == [100, len(footer.data) - 100]


def test_a_footer_is_stored(tmp_path):
    footer = footer_of(write(tmp_path / "a.parquet", table(SAMPLES), (10,)))
    file = tmp_path / "folder" / "a.footer"
    assert ParquetFooter.load(file, footer.url, footer.size) is None
    footer.save(file)
    assert ParquetFooter.load(file, footer.url, footer.size) == footer
    for damage in (b"", file.read_bytes()[:-1], b"x" + file.read_bytes()[1:]):
        file.write_bytes(damage)
        assert ParquetFooter.load(file, footer.url, footer.size) is None


def _thrift_damage(data):
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length] + bytes(length) + data[-8:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "does not end with a footer"),
        (lambda data: b"PAR1", "does not end with a footer"),
        (lambda data: data[:-1], "does not end with a footer"),
        (lambda data: data[: len(data) // 2], "does not end with a footer"),
        (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "does not end with a footer"),
        (lambda data: b"no parquet" * 100, "does not end with a footer"),
        (_thrift_damage, "is not a complete parquet file: "),
        (lambda data: data[:-4] + b"PARE", "is encrypted; decrypt it first"),
    ],
)
def test_files_that_are_no_whole_parquet_are_named(tmp_path, damage, message):
    file = tmp_path / "a.parquet"
    write(file, table(SAMPLES), (10,))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ShardError, match=rf"a\.parquet .*{message}") as error:
        footer_of(file)
    assert "\n" not in str(error.value)


def test_a_server_without_ranges_is_named(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    samples = [(name, image * 200, text) for name, image, text in SAMPLES]
    write(tmp_path / "a.parquet", table(samples), (10,))
    said = pytest.raises(ShardError, match=r"a\.parquet cannot be read: .*the server does not support ranges")
    with serve_ranges(tmp_path, lambda name, start: "whole") as place, said:
        footer_of(f"{place}/a.parquet")


# -- columns

STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
TEXT, LISTS = pyarrow.large_string(), pyarrow.list_(pyarrow.large_string())


@pytest.mark.parametrize(
    ("option", "kind", "source"),
    [
        ("image_column", STRUCT, Source("it.bytes", pyarrow.large_binary())),
        ("image_column", pyarrow.binary(), Source("it", pyarrow.large_binary())),
        ("image_column", pyarrow.large_binary(), Source("it", pyarrow.large_binary())),
        ("image_column", pyarrow.binary(3), Source("it", pyarrow.large_binary())),
        ("image_column", pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()), Source("it", pyarrow.large_binary())),
        ("caption_column", pyarrow.string(), Source("it", TEXT)),
        ("caption_column", pyarrow.large_string(), Source("it", TEXT)),
        ("caption_column", pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), Source("it", TEXT)),
        ("caption_column", pyarrow.null(), Source("it", TEXT)),
        ("caption_column", pyarrow.list_(pyarrow.string()), Source("it", LISTS)),
        ("caption_column", pyarrow.large_list(pyarrow.large_string()), Source("it", LISTS)),
        ("caption_column", pyarrow.list_(pyarrow.string(), 2), Source("it", LISTS)),
        ("class_column", pyarrow.int64(), Source("it", pyarrow.int64())),
        ("class_column", pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), Source("it", pyarrow.string())),
    ],
)
def test_columns_that_can_be_read(tmp_path, option, kind, source):
    footer = one_column(tmp_path, pyarrow.array([], kind), "it")
    assert find_source(footer, option, "it") == source


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("image_column", pyarrow.string()),  # an address
        ("image_column", pyarrow.list_(pyarrow.binary())),
        ("image_column", pyarrow.list_(STRUCT)),
        ("image_column", pyarrow.list_(pyarrow.list_(pyarrow.uint8()))),
        ("image_column", pyarrow.struct({"path": pyarrow.string()})),
        ("image_column", pyarrow.struct({"bytes": pyarrow.string()})),
        ("caption_column", pyarrow.int64()),
        ("caption_column", pyarrow.binary()),
        ("caption_column", pyarrow.struct({"en": pyarrow.string()})),
        ("caption_column", pyarrow.list_(pyarrow.list_(pyarrow.string()))),
        ("class_column", pyarrow.float32()),
        ("class_column", pyarrow.list_(pyarrow.int64())),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, option, kind):
    footer = one_column(tmp_path, pyarrow.array([], kind), "it")
    with pytest.raises(ValueError, match=rf"column\.parquet: --{option}='it' is a column of .*; expected .*"):
        find_source(footer, option, "it")


def test_an_unknown_column_is_refused_with_those_there_are(tmp_path):
    footer = footer_of(write(tmp_path / "a.parquet", table(SAMPLES), (10,)))
    with pytest.raises(ValueError, match=r"a\.parquet has the columns image, text; --caption_column='caption' is not"):
        find_source(footer, "caption_column", "caption")


# -- row groups


def test_only_the_columns_and_the_row_group_that_are_asked_for_are_read(tmp_path, reads):
    content = table(SAMPLES, junk=[bytes(50_000)] * 10)
    footer = flaky(tmp_path, content, (4, 6))
    reads.clear()
    found = read(footer, 1, image_column="image", caption_column="text")
    assert found == {
        "image_column": [image for _, image, _ in SAMPLES[4:]],
        "caption_column": [text for *_, text in SAMPLES[4:]],
    }
    assert len(reads) == 3  # two columns, and the footer once more
    assert sum(reads[:2]) < 10_000
    assert read(footer, 0, caption_column="text") == {"caption_column": [text for *_, text in SAMPLES[:4]]}


def test_a_big_row_group_is_read_in_pieces(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(parquet_file, "_PIECE", 2**16)
    monkeypatch.setattr(parquet_file, "_BATCH", 2**16)
    image = pyarrow.compute.cast(pyarrow.array(range(10**4)), pyarrow.string()).to_pylist()
    images = [("".join(image) + str(number)).encode() for number in range(40)]
    content = pyarrow.table({"image": images})
    file = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 2**10, "write_batch_size": 1}
    pyarrow.parquet.write_table(content, file, **options)
    fsspec.filesystem("flaky").pipe("/a.parquet", file.read_bytes())
    footer = footer_of("flaky://a.parquet")
    reads.clear()
    batches = list(read_row_group(footer, 0, {"image": find_source(footer, "image_column", "image")}))
    assert [image for batch in batches for image in batch.column("image").to_pylist()] == images
    assert len(batches) >= 20
    assert max(reads) <= 2**17
    assert len(reads) >= footer.size // 2**17


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array(["a", None, "a", ""]),
        pyarrow.array(["a", None, "a", ""]).dictionary_encode(),
        pyarrow.array(["a", None, "a", ""], pyarrow.large_string()),
        pyarrow.array([None] * 4),
        pyarrow.array([["a", "b"], [], None, [None]]),
        pyarrow.array([["a", "b"], [], None, [None]], pyarrow.large_list(pyarrow.string())),
        pyarrow.array([["a", "b"], ["c", "d"], [None, "e"]], pyarrow.list_(pyarrow.string(), 2)),
        pyarrow.ListArray.from_arrays([0, 1, 2, 2, 3], pyarrow.array(["a", "b", "a"]).dictionary_encode()),
    ],
)
def test_captions_are_the_same_however_they_are_encoded(tmp_path, values):
    footer = one_column(tmp_path, values)
    assert read(footer, 0, caption_column="text") == {"caption_column": values.to_pylist()}


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([b"ab", None, b"cd"]),
        pyarrow.array([b"ab", None, b"cd"], pyarrow.large_binary()),
        pyarrow.array([b"ab", None, b"cd"], pyarrow.binary(2)),
        pyarrow.array([b"ab", None, b"cd"]).dictionary_encode(),
        pyarrow.array([None, None, None]),
    ],
)
@pytest.mark.parametrize("struct", [False, True])
def test_images_are_the_same_however_they_are_encoded(tmp_path, values, struct):
    column = pyarrow.StructArray.from_arrays([values, pyarrow.array(["x"] * 3)], ["bytes", "path"])
    footer = one_column(tmp_path, column if struct else values, "image")
    assert read(footer, 0, image_column="image") == {"image_column": values.to_pylist()}


def test_images_that_are_null(tmp_path):
    images = pyarrow.array([{"bytes": b"a", "path": None}, None, {"bytes": None, "path": "b.png"}], STRUCT)
    footer = one_column(tmp_path, images, "image")
    assert read(footer, 0, image_column="image") == {"image_column": [b"a", None, None]}


def test_a_column_whose_name_has_a_dot(tmp_path):
    footer = one_column(tmp_path, pyarrow.array([b"a"]), "image.bytes")
    assert read(footer, 0, image_column="image.bytes") == {"image_column": [b"a"]}


def test_a_damaged_page_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, table(SAMPLES), (4, 6))
    footer = footer_of(file)
    chunk = footer.metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(data)
    with pytest.raises(ShardError, match=r"^row group 1 of .*a\.parquet cannot be decoded: .*If the file is da"):
        read(footer, 1, image_column="image")
    assert len(read(footer, 0, image_column="image")["image_column"]) == 4


def test_a_checksum_that_is_not_that_of_its_page_is_noticed(tmp_path):
    file = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"12345678" * 10]}), file, **options)
    footer = footer_of(file)
    assert read(footer, 0, image_column="image") == {"image_column": [b"12345678" * 10]}
    file.write_bytes(file.read_bytes().replace(b"12345678", b"12x45678", 1))
    with pytest.raises(ShardError, match=r"row group 0 of .*a\.parquet cannot be decoded: .*CRC"):
        read(footer, 0, image_column="image")


def test_a_file_that_is_another_than_its_footer_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, table(SAMPLES), (10,))
    footer = footer_of(file)
    others = [(name, image[::-1], text.upper()) for name, image, text in SAMPLES]
    for samples in (others, SAMPLES * 2, SAMPLES[:9]):
        write(file, table(samples), (len(samples),))
        with pytest.raises(
            ShardError, match=r"a\.parquet (changed while it was in use\. Restore|cannot be read: the serv)"
        ):
            read(footer, 0, image_column="image", caption_column="text")


def test_an_error_of_the_server_says_the_row_group(tmp_path, monkeypatch):
    footer = flaky(tmp_path, table(SAMPLES), (10,))
    monkeypatch.setattr(FlakyFileSystem, "errors", [RuntimeError("500, server error")])
    with pytest.raises(ShardError, match=r"^flaky://a\.parquet cannot be read: 500, server error \(in row group 0\)$"):
        read(footer, 0, image_column="image")


def test_a_row_group_with_fewer_rows_than_its_footer_says_is_refused(tmp_path, monkeypatch):
    footer = footer_of(write(tmp_path / "a.parquet", table(SAMPLES), (10,)))
    decode = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda *args, **options: (batch[:9] for batch in decode(*args, **options)),
    )
    with pytest.raises(ShardError, match=r"row group 0 of .*a\.parquet has 9 of 10 rows: download or create"):
        read(footer, 0, image_column="image")

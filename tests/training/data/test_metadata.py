"""Metadata files: what they say, and where they are broken."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from zsnr_diffusers.training.data.metadata import (
    MetadataError,
    caption_values,
    class_values,
    column_names,
    find_path_column,
    read_metadata,
    relative_path,
    unify_captions,
)

ROWS = [
    {"file_name": "a.png", "text": "a cat, asleep"},
    {"file_name": "b/ü.png", "text": 'two\nlines and "quotes"'},
    {"file_name": "c.png", "text": ""},
]


def jsonl(path, content, bom=b"", end="\n"):
    file = path / "metadata.jsonl"
    text = content if isinstance(content, str) else end.join(json.dumps(row, ensure_ascii=False) for row in content)
    file.write_bytes(bom + text.encode())
    return file


def csv(path, text):
    file = path / "metadata.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def parquet(path, rows):
    file = path / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


CSV = 'file_name,text\r\na.png,"a cat, asleep"\r\nb/ü.png,"two\nlines and ""quotes"""\r\n\r\nc.png,\r\n'


@pytest.mark.parametrize(
    ("write", "numbers"),
    [
        (lambda path: jsonl(path, ROWS), [1, 2, 3]),
        (lambda path: jsonl(path, ROWS, bom=b"\xef\xbb\xbf", end="\r\n\r\n"), [1, 3, 5]),
        (lambda path: csv(path, CSV), [2, 3, 6]),
        (lambda path: csv(path, b"\xef\xbb\xbf" + CSV.encode()), [2, 3, 6]),
        (lambda path: parquet(path, ROWS), [1, 2, 3]),
    ],
    ids=["jsonl", "jsonl of Windows", "csv", "csv of Excel", "parquet"],
)
def test_all_formats_say_the_same(tmp_path, write, numbers):
    records = read_metadata(write(tmp_path))
    assert [record.values for record in records] == ROWS
    assert [record.number for record in records] == numbers
    assert column_names(records) == ["file_name", "text"]
    assert [relative_path(record, "file_name") for record in records] == ["a.png", "b/ü.png", "c.png"]


@pytest.mark.parametrize(
    ("columns", "image_column", "found"),
    [
        (["text", "file_name"], "image", "file_name"),
        (["image_file_name", "text"], "image", "image_file_name"),
        (["image", "text"], "image", "image"),
        (["image", "file_name"], "image", "file_name"),
        (["photo_file_name", "file_name"], "photo", "photo_file_name"),
    ],
)
def test_paths_are_in_the_column_of_the_images(tmp_path, columns, image_column, found):
    records = read_metadata(jsonl(tmp_path, [{name: "a.png" for name in columns}]))
    assert find_path_column(records, image_column) == found


def test_paths_are_brought_into_one_form(tmp_path):
    names = ["./a.png", "b\\c.png", "d/../a.png", "a b#%[*].png"]
    records = read_metadata(jsonl(tmp_path, [{"file_name": name} for name in names]))
    assert [relative_path(record, "file_name") for record in records] == ["a.png", "b/c.png", "a.png", "a b#%[*].png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b.png", "text": "x"', "line 3 is not JSON: .* at column"),
        ('{"file_name": "b.png",, }', "line 3 is not JSON: .* at column [0-9]+; each line is an object"),
        ("[" * 100_000, "line 3 is not JSON: "),
        ('["b.png", "x"]', r"line 3 is \['b.png', 'x'\]; each line is an object"),
        ('"b.png"', "line 3 is 'b.png'; each line is an object"),
        (r'{"file_name": "b.png", "text": "\ud83d"}', "line 3 has an incomplete surrogate pair"),
    ],
    ids=["cut off", "comma", "deep", "list", "text", "surrogate"],
)
def test_a_broken_line_of_json_is_named(tmp_path, line, message):
    file = jsonl(tmp_path, '{"file_name": "a.png", "text": "x"}\n\n' + line + '\n{"file_name": "c.png"}\n')
    with pytest.raises(MetadataError, match=rf"metadata\.jsonl, {message}"):
        read_metadata(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "file_name is missing; expected the path of an image, relative to the folder of this file"),
        ({"file_name": None}, "file_name is None"),
        ({"file_name": 5}, "file_name is 5"),
        ({"file_name": ["a.png"]}, r"file_name is \['a.png'\]"),
        ({"file_name": " "}, "file_name is ' '"),
        ({"file_name": "../a.png"}, r"file_name is '\.\./a.png', which is not below the folder"),
        ({"file_name": "a/../../b.png"}, ".* which is not below the folder"),
        ({"file_name": "/etc/passwd"}, ".* which is not below the folder"),
        ({"file_name": "file:///a.png"}, ".* which is not below the folder"),
    ],
)
def test_a_path_that_is_none_is_named(tmp_path, row, message):
    records = read_metadata(jsonl(tmp_path, [{"file_name": "a.png"}, row]))
    with pytest.raises(MetadataError, match=rf"metadata\.jsonl, line 2: {message}"):
        [relative_path(record, "file_name") for record in records]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,text\na.png,x\nb.png,one, two\n",
            r"line 3 has 3 fields, but the header has 2 \(file_n",
        ),
        ('file_name,text\na.png,"two\nlines"\nb.png\n', "line 4 has 1 fields, but the header has 2"),
        ('file_name,text\na.png,x\nb.png,"open\nc.png,y\n', "line 3 is not CSV: unexpected end of data"),
        ('file_name,text\na.png,"x"y\n', "line 2 is not CSV: "),
        ("file_name,file_name\na.png,x\n", "line 1 has a duplicate column: file_name, file_name"),
        (b"file_name,text\na.png,caf\xe9\n", "line 2: not UTF-8"),
    ],
    ids=["too many", "too few", "open quote", "after a quote", "twice", "Latin-1"],
)
def test_a_broken_line_of_csv_is_named(tmp_path, text, message):
    with pytest.raises(MetadataError, match=rf"metadata\.csv, {message}"):
        read_metadata(csv(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["a.png,a cat\nb.png,snow\n", "file_name;text\na.png;a cat\n", "name,text\na.png,x\n"]
)
def test_a_missing_header_is_named(tmp_path, text):
    columns = text.splitlines()[0].replace(",", ", ")
    with pytest.raises(
        MetadataError, match=rf"metadata\.csv, line 1: file_name .* is missing; the columns are {columns}\."
    ):
        find_path_column(read_metadata(csv(tmp_path, text)), "image")


def test_no_paths_at_all_are_named_with_the_columns(tmp_path):
    records = read_metadata(jsonl(tmp_path, [{"photo_file_name": "a.png", "text": "x"}]))
    with pytest.raises(MetadataError, match=r"jsonl, line 1: .* photo_file_name, text\. .*--image_column x"):
        find_path_column(records, "image")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all", None], ids=["empty", "mark", "text", "cut off"])
def test_a_damaged_table_is_named(tmp_path, content):
    file = parquet(tmp_path, ROWS)
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    with pytest.raises(MetadataError, match=r"metadata\.parquet is not a complete Parquet file: "):
        read_metadata(file)


@pytest.mark.parametrize("write", [jsonl, csv])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_no_rows(tmp_path, write, text):
    with pytest.raises(MetadataError, match="has no rows"):
        read_metadata(write(tmp_path, text))


def test_a_header_alone_and_a_table_without_rows_hold_none(tmp_path):
    with pytest.raises(MetadataError, match="has no rows"):
        read_metadata(csv(tmp_path, "file_name,text\n"))
    file = tmp_path / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"file_name": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(MetadataError, match="has no rows"):
        read_metadata(file)


def test_a_folder_whose_name_looks_like_a_partition_adds_no_column(tmp_path):
    (tmp_path / "style=oil").mkdir()
    assert column_names(read_metadata(parquet(tmp_path / "style=oil", ROWS))) == ["file_name", "text"]


# -- columns


def values(tmp_path, read, column, given):
    return read(read_metadata(jsonl(tmp_path, [{"file_name": "a.png", column: value} for value in given])), column)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", None], ["a", None]),
        (["a", ["b", "c"], None, []], [["a"], ["b", "c"], None, []]),
    ],
)
def test_captions_are_texts_or_lists_throughout(tmp_path, given, expected):
    assert values(tmp_path, caption_values, "text", given) == expected
    assert unify_captions(given) == expected


def test_a_row_without_the_column_has_no_caption(tmp_path):
    records = read_metadata(jsonl(tmp_path, [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png"}]))
    assert caption_values(records, "text") == ["x", None]


@pytest.mark.parametrize("wrong", [5, 0, False, 0.5, {"a": 1}, ["a", 5], ["a", None]])
def test_a_caption_of_another_type_is_named(tmp_path, wrong):
    with pytest.raises(MetadataError, match=r"metadata\.jsonl, line 2: text is .*; a caption is text, or a list"):
        values(tmp_path, caption_values, "text", ["a", wrong])


def test_captions_of_csv_are_text_whatever_they_look_like(tmp_path):
    records = read_metadata(csv(tmp_path, "file_name,text\na.png,12\nb.png,NA\nc.png,\nd.png,None\n"))
    assert caption_values(records, "text") == ["12", "NA", "", "None"]


def test_whole_numbers_of_csv_are_numbers_and_nothing_is_none(tmp_path):
    records = read_metadata(csv(tmp_path, "file_name,label,word\na.png,10,cat\nb.png,2,7\nc.png,,\n"))
    assert class_values(records, "label") == [10, 2, None]
    assert class_values(records, "word") == ["cat", "7", None]


@pytest.mark.parametrize("given", [[1, "a"], ["a", 1], [None, 1, "a"], [1, True]])
def test_a_column_of_several_types_is_named_with_both_lines(tmp_path, given):
    last = len(given)
    with pytest.raises(MetadataError, match=rf"line {last}: label is .*, and .* at .*line {last - 1}"):
        values(tmp_path, class_values, "label", given)

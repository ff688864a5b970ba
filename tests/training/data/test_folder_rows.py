"""Folders of images as people have them: which images are used, with which captions or classes, and what is said."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images, open_rows


def fill(folder, names, captions=None):
    """Images of these names, each of other pixels; with captions, a file of this extension beside each."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if captions:
            path.with_suffix(captions).write_text(f"caption of {name}", encoding="utf-8")
    return folder


def metadata(folder, rows, suffix=".jsonl"):
    """Write rows as metadata of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"metadata{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def captioned(folder, **options):
    """Caption of each image by its path in the folder, in the order of rows."""
    config = TrainingConfig(pretrained_model_name_or_path="base", train_data_dir=str(folder), **options)
    return used(folder, config, "text")


def classified(folder, **options):
    """Class of each image by its path in the folder."""
    config = PixelTrainingConfig(train_data_dir=str(folder), class_column="label", **options)
    return used(folder, config, "label")


def used(folder, config, column):
    rows = open_rows(config)
    good = check_images(rows, config, progress=False)
    feature = rows.features[column]
    return {
        os.path.relpath(rows[row]["image"]["path"], folder): feature.int2str(rows[row][column])
        if isinstance(feature, datasets.ClassLabel)
        else rows[row][column]
        for row in good
    }


SPLIT_LIKE = ["steam-train-1.png", "dev-2.png", "valid 3.png", "test shots/4.png", "my_test.png", "eval.png", "ok.png"]
ODD = [
    *("data/train-00000-of-00001.png", "data/test-00000-of-00001.png", "__pycache__/a.png", "__x/b.png"),
    *("a*b.png", "c[d].png", "e f.png", "ü/日本.png", "#1.png", "50%.png", "?.png", "{g}.png", "a,b.png", "'\".png"),
    *("x://y.png", "::z.png", "deep/" * 20 + "h.png", "long" * 60 + ".png", "README.md.png", "back\\slash.png"),
]


@pytest.mark.parametrize("names", [SPLIT_LIKE, ODD], ids=["splits", "odd"])
def test_all_images_are_used_whatever_they_are_called(tmp_path, names, capsys):
    folder = fill(tmp_path / "train-1" / "photos", names, ".txt")
    expected = {os.path.normpath(name): f"caption of {name}" for name in names}
    assert captioned(folder) == expected
    assert capsys.readouterr().out == ""
    for path in folder.rglob("*.txt"):
        path.unlink()
    plain = [name for name in names if "\\" not in name and "://" not in name]  # these are separators in metadata
    metadata(folder, [{"file_name": name, "text": f"caption of {name}"} for name in plain])
    assert captioned(folder) == {os.path.normpath(name): f"caption of {name}" for name in plain}


@pytest.mark.parametrize(
    "classes", [("bus", "car", "train", "truck"), ("test shots", "train-1", "x"), ("10", "2"), ("cat", "cat-big")]
)
def test_class_folders_keep_all_images_and_classes(tmp_path, classes):
    folder = fill(tmp_path / "data", [f"{name}/{i}.png" for name in classes for i in range(3)])
    assert classified(folder) == {f"{name}/{i}.png": name for name in classes for i in range(3)}


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.png" for i in range(12)],
        [f"{name}/{i}.jpg" for name in ("b", "a-1", "a", "a b", "A") for i in (2, 10, 1)],
        ["b/c/1.png", "b.png", "a/2.PNG", "b/1.png"],
    ],
)
def test_the_order_is_that_of_datasets(tmp_path, names):
    """What a seed gives depends on it; these names have no splits in them."""
    folder = fill(tmp_path / "data", names)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    ours = open_rows(PixelTrainingConfig(train_data_dir=str(folder)))
    paths = [row["image"]["path"] for row in theirs.cast_column("image", datasets.Image(decode=False))]
    assert [row["image"]["path"] for row in ours] == paths
    if "label" in theirs.column_names:
        config = PixelTrainingConfig(train_data_dir=str(folder), class_column="label")
        ours = open_rows(config)
        assert list(ours["label"]) == list(theirs["label"])
        assert ours.features["label"] == theirs.features["label"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_metadata_is_read_as_datasets_reads_it(tmp_path, suffix):
    folder = fill(tmp_path / "data", ["b.png", "a.png", "n/c.png"])
    rows = [{"text": f"of {name}", "file_name": name} for name in ("n/c.png", "b.png", "a.png")]
    metadata(folder, rows)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    (folder / "metadata.jsonl").unlink()
    config = TrainingConfig(pretrained_model_name_or_path="base", train_data_dir=str(metadata(folder, rows, suffix)))
    ours = open_rows(config)
    assert [dict(row) for row in ours] == [{name: row[name] for name in ("image", "text")} for row in theirs]
    assert ours.features == datasets.Features({name: theirs.features[name] for name in ("image", "text")})


# -- splits


def test_of_splits_train_is_used_and_the_others_are_counted(tmp_path, capsys):
    names = ["train/1.png", "train/n/2.png", "test/1.png", "validation/1.png", "validation/2.png", "0.png"]
    folder = fill(tmp_path / "data", names, ".txt")
    assert list(captioned(folder)) == ["train/1.png", "train/n/2.png"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("images of train/ are used", "1 of test/", "2 of validation/", "1 next to it"):
        assert part in said


@pytest.mark.parametrize("above", ["", "images"])
def test_splits_may_have_classes_capitals_and_a_folder_above(tmp_path, above):
    names = [f"{split}/{name}/{i}.png" for split in ("Train", "Test") for name in ("a", "test") for i in range(2)]
    fill(tmp_path / "data" / above, names)
    expected = {os.path.join(above, name): name.split("/")[1] for name in names if name.startswith("Train")}
    assert classified(tmp_path / "data") == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/1.png", "test/1.png", "masks/1.png"], "with masks/ next to them, they are not splits"),
        (["test/1.png", "val/1.png"], "there is no train/"),
        (["train/1.png", "2.png"], ""),
        (["train/1.png"], ""),
        (["test/1.png"], ""),
    ],
)
def test_what_is_no_folder_of_splits_is_used_whole(tmp_path, names, said, capsys):
    folder = fill(tmp_path / "data", names, ".txt")
    assert set(captioned(folder)) == set(names)
    output = capsys.readouterr().out
    assert said in output if said else output == ""


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_metadata_may_lie_in_the_split_or_above_it(tmp_path, suffix, capsys):
    names = ["train/1.png", "train/2.png", "test/1.png"]
    inside = fill(tmp_path / "inside", names)
    metadata(inside / "train", [{"file_name": "2.png", "text": "two"}, {"file_name": "1.png", "text": "one"}], suffix)
    metadata(inside / "test", [{"file_name": "1.png", "text": "of the test"}], suffix)
    above = metadata(fill(tmp_path / "above", names), [{"file_name": name, "text": name} for name in names], suffix)
    assert captioned(inside) == {"train/2.png": "two", "train/1.png": "one"}
    assert captioned(above) == {"train/1.png": "train/1.png", "train/2.png": "train/2.png"}
    assert capsys.readouterr().out.count("skipped: 1 of test/") == 2


def test_splits_of_a_data_set_by_name_are_counted(tmp_path, capsys):
    for split, count in (("train", 2), ("test", 3)):
        rows = [{"image": {"bytes": b"", "path": None}, "text": "x"}] * count
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    config = TrainingConfig(pretrained_model_name_or_path="base", dataset_name=str(tmp_path / "set"))
    assert len(open_rows(config)) == 2
    assert "rows of the split train are used; skipped: 3 of test" in capsys.readouterr().out


# -- metadata


def test_metadata_in_folders_is_relative_to_itself(tmp_path):
    folder = fill(tmp_path / "data", ["a/1.png", "b/1.png", "c.png"])
    metadata(folder / "a", [{"file_name": "1.png", "text": "of a"}])
    metadata(folder / "b", [{"file_name": "1.png", "text": ["of b", "again"], "more": 5}], ".parquet")
    metadata(folder, [{"image": "c.png", "text": None}])
    assert captioned(folder) == {"a/1.png": ["of a"], "b/1.png": ["of b", "again"], "c.png": None}


def test_images_without_a_row_and_rows_without_an_image_are_named(tmp_path, capsys):
    folder = fill(tmp_path / "data", [f"{i}.png" for i in range(9)])
    metadata(folder, [{"file_name": f"{name}.png", "text": "x"} for name in (0, "gone", 1)])
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read:\s+.*gone\.png: the file does not exist"):
        captioned(folder)
    assert list(captioned(folder, on_bad_image="skip")) == ["0.png", "1.png"]
    said = "7 of 9 images have no row in metadata.jsonl and are skipped: 2.png, 3.png, 4.png, 5.png, 6.png and 2 more"
    assert capsys.readouterr().out.count(said) == 2


def test_a_file_that_is_named_is_used_though_it_does_not_look_like_an_image(tmp_path):
    folder = fill(tmp_path / "data", ["a.png"])
    for name in ("000017", ".hidden.png"):
        shutil.copy(folder / "a.png", folder / name)
    metadata(folder, [{"file_name": name, "text": name} for name in ("000017", ".hidden.png", "a.png")])
    assert list(captioned(folder)) == ["000017", ".hidden.png", "a.png"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_may_be_stored_in_another_normal_form(tmp_path, form):
    folder = fill(tmp_path / "data", [unicodedata.normalize(form, "é.png")])
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    metadata(folder, [{"file_name": unicodedata.normalize(other, "é.png"), "text": "x"}])
    assert list(captioned(folder).values()) == ["x"]


def test_two_files_of_metadata_in_a_folder_are_refused(tmp_path):
    folder = metadata(fill(tmp_path / "data", ["a.png"]), [{"file_name": "a.png", "text": "x"}])
    metadata(folder, [{"file_name": "a.png", "text": "y"}], ".csv")
    with pytest.raises(ValueError, match=r"metadata\.csv and metadata\.jsonl describe the same images: remove one"):
        captioned(folder)


def test_where_there_is_metadata_caption_files_are_not_read_and_that_is_said_once(tmp_path, capsys):
    folder = metadata(fill(tmp_path / "data", ["a.png"], ".txt"), [{"file_name": "a.png", "text": "of metadata"}])
    assert captioned(folder) == {"a.png": "of metadata"}
    assert capsys.readouterr().out == "captions come from metadata.jsonl; .txt files are not read: 1\n"


def test_rows_without_a_caption_are_counted(tmp_path, capsys):
    folder = fill(tmp_path / "data", ["a.png", "b.png"])
    metadata(folder, [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png"}])
    assert captioned(folder) == {"a.png": "x", "b.png": None}
    assert "rows of metadata.jsonl without text, which get the empty caption: 1" in capsys.readouterr().out


def test_columns_that_nobody_wants_may_hold_anything(tmp_path):
    folder = fill(tmp_path / "data", ["a.png", "b.png"])
    rows = [{"file_name": "a.png", "label": "x", "score": 1}, {"file_name": "b.png", "label": "y", "score": [{}]}]
    assert classified(metadata(folder, rows)) == {"a.png": "x", "b.png": "y"}
    with pytest.raises(ValueError, match=r"has the columns image, label, score; --caption_column='text' is not one"):
        captioned(folder)


# -- captions beside the images


def test_captions_lie_beside_the_images_in_any_folder(tmp_path):
    folder = fill(tmp_path / "data", ["b.png", "n/m/a.JPG", "n/c.v2.webp"], ".txt")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (folder / "n" / "m" / "a.txt").write_text("")
    expected = {"b.png": ["one", "two"], "n/c.v2.webp": ["caption of n/c.v2.webp"], "n/m/a.JPG": [""]}
    captions = captioned(folder)
    assert captions == expected
    assert list(captions) == list(expected)


def test_images_without_a_caption_are_counted_named_and_left_out(tmp_path, capsys):
    folder = fill(tmp_path / "data", [f"{i}.png" for i in range(3)], ".caption")
    fill(folder, [f"x{i}.png" for i in range(7)])
    assert list(captioned(folder, caption_extension=".caption")) == ["0.png", "1.png", "2.png"]
    said = "7 of 10 images have no .caption file and are skipped: x0.png, x1.png, x2.png, x3.png, x4.png and 2 more\n"
    assert capsys.readouterr().out == said
    with pytest.raises(ValueError, match=r"but no captions: .* 3 \.caption files .*: pass --caption_extension \.capt"):
        captioned(folder)


def test_a_caption_that_cannot_be_read_is_named(tmp_path, capsys):
    folder = fill(tmp_path / "data", ["a.png", "b.png"], ".txt")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"1 of 2 captions cannot be read:\s+.*a\.txt: it is not UTF-8 \(byte 3\)"):
        captioned(folder)
    assert captioned(folder, on_bad_image="skip") == {"b.png": "caption of b.png"}
    assert "a.txt: it is not UTF-8" in capsys.readouterr().out
    (folder / "b.txt").write_bytes(b"\xff\xfea\0")
    with pytest.raises(ValueError, match="There are no images left"):
        captioned(folder, on_bad_image="skip")


def test_json_beside_the_images(tmp_path):
    folder = fill(tmp_path / "data", ["images/a.png", "images/b.png"])
    for name, text in (("a", "one"), ("b", ["two", "three"])):
        (folder / "images" / f"{name}.json").write_text(json.dumps({"text": text, "width": 4}))
    with pytest.raises(ValueError, match=r"There are 2 \.json files next to them: pass --caption_extension \.json"):
        captioned(folder)
    expected = {"images/a.png": ["one"], "images/b.png": ["two", "three"]}
    assert captioned(folder, caption_extension=".json") == expected


@pytest.mark.parametrize("extension", ["txt", "", ".", "./txt", "..", ".txt."])
def test_an_extension_that_is_none_is_refused(extension):
    with pytest.raises(ValueError, match=r"--caption_extension='.*' is not a file extension: begin with a dot"):
        TrainingConfig(pretrained_model_name_or_path="b", train_data_dir="d", caption_extension=extension)


# -- classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "b/1.png", "cover.png"], r"not so b/1\.png, cover\.png"),
        (["a/1.png", "b/c/1.png"], r"not so a/1\.png, b/c/1\.png"),
        (["a/1.png", "a/2.png"], "all lie in a/"),
    ],
)
def test_folders_that_are_no_classes_are_named(tmp_path, names, message):
    with pytest.raises(ValueError, match=f"has no column label: .*; {message}"):
        classified(fill(tmp_path / "data", names))


# -- what lies in a folder


def test_links_to_files_and_folders_are_followed_and_circles_are_not(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", ["1.png", "n/2.png"], ".txt")
    folder = fill(tmp_path / "data", ["0.png"], ".txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "self").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    (folder / "3.png").symlink_to(elsewhere / "1.png")
    (folder / "3.txt").symlink_to(elsewhere / "1.txt")
    rows = captioned(folder)
    assert list(rows) == ["0.png", "3.png", "linked/1.png", "linked/n/2.png"]
    (folder / "4.png").symlink_to(tmp_path / "nowhere")
    (folder / "4.txt").write_text("x")
    with pytest.raises(ValueError, match=r"4\.png: the file does not exist"):
        captioned(folder)
    (tmp_path / "link").symlink_to(folder)
    assert list(captioned(tmp_path / "link", on_bad_image="skip")) == list(rows)


def test_hidden_images_are_counted_but_not_the_forks_of_a_mac(tmp_path, capsys):
    folder = fill(tmp_path / "data", ["a.png", ".b.png", "._a.png", ".cache/c.png"], ".txt")
    assert list(captioned(folder)) == ["a.png"]
    assert capsys.readouterr().out == "skipped hidden images: 1 (.b.png)\n"


def test_what_a_run_writes_into_its_data_is_no_data(tmp_path):
    folder = fill(tmp_path / "data", ["a.png", "run/preview.png"], ".txt")
    assert list(captioned(folder, output_dir=str(folder / "run"))) == ["a.png"]
    assert len(captioned(folder, output_dir=str(tmp_path))) == 2


def test_archives_and_tables_are_named(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.zip", "b.tar", "train-00000-of-00001.parquet"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"no images, but 1 \.zip, 1 \.tar, 1 \.parquet: extract .* --dataset_name\."):
        captioned(folder)
    captioned(fill(folder, ["a.png"], ".txt"))
    assert "also contains 1 .zip, 1 .tar, 1 .parquet, which are not read" in capsys.readouterr().out


def test_one_image_and_none(tmp_path):
    assert captioned(fill(tmp_path / "one", ["A.PNG"], ".txt")) == {"A.PNG": "caption of A.PNG"}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none contains no images\.$"):
        captioned(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match=r"A\.PNG' is a file"):
        captioned(tmp_path / "one" / "A.PNG")


def test_formats_that_lack_a_package_stop_the_run_before_images_are_read(tmp_path, monkeypatch):
    folder = fill(tmp_path / "data", ["a.png", "b.png", "c.png"], ".txt")
    (folder / "b.png").rename(folder / "b.HEIC")
    said = "1 image in HEIC (.heic) needs `pip install pillow-heif`"
    lacking = lambda paths: [said] if any(Path(path).suffix == ".HEIC" for path in paths) else []  # noqa: E731
    monkeypatch.setattr("zsnr_diffusers.training.data.folder_rows.missing_packages", lacking)
    with pytest.raises(ValueError, match=r"1 image in HEIC .* --on_bad_image skip"):
        captioned(folder)
    (folder / "b.txt").unlink()  # the image is left out anyway
    assert list(captioned(folder)) == ["a.png", "c.png"]


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8_is_shown(tmp_path, capsys):
    folder = fill(tmp_path / "data", ["a.png"], ".txt")
    shutil.copy(folder / "a.png", os.fsencode(folder / "b") + b"\xe9.png")
    with pytest.raises(ValueError, match=r"1 of 2 images have names that are not UTF-8:\s+.*b\\xe9\.png"):
        captioned(folder)
    assert list(captioned(folder, on_bad_image="skip")) == ["a.png"]

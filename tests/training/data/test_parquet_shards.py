"""Rows of parquet files: what is read when, and what is refused; what all formats share is in `test_shards.py`."""

import dataclasses
import pickle
import random

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hub_dataset import serve_dataset
from parquet_shards import table, write, write_by_datasets, write_parquet
from tar_shards import captioned, serve_ranges, to_memory
from training_runs import same, trained

from zsnr_diffusers.training import PixelTrainingConfig, TrainingConfig, train
from zsnr_diffusers.training.checkpointing.fingerprint import _data_sha256
from zsnr_diffusers.training.data import parquet_shards, shard_cache
from zsnr_diffusers.training.data.dataset import (
    captions_as_list,
    check_images,
    image_size,
    open_rows,
    read_image,
    row_name,
)
from zsnr_diffusers.training.data.loader import make_generator
from zsnr_diffusers.training.data.remote import ShardError
from zsnr_diffusers.training.data.shard_formats import create_shards, index_shards
from zsnr_diffusers.training.data.shuffle import ShardShuffle
from zsnr_diffusers.training.pixels import PixelTask
from zsnr_diffusers.training.pixels.classes import read_classes
from zsnr_diffusers.utils.distributed import Processes
from zsnr_diffusers.utils.images import ImageError

pytestmark = pytest.mark.usefixtures("reads")


@pytest.fixture
def shard_options(options, image_folder, tmp_path):
    """A small run's options on three row groups of ten images in two files."""
    pattern = write_parquet(tmp_path / "shards", captioned(image_folder))
    return {**options, "train_data_dir": None, "train_shards": pattern, "shuffle_shards": 2}


def configured(options, **changes):
    return TrainingConfig(**{**options, **changes})


def opened(options, **changes):
    return open_rows(configured(options, **changes))


# -- rows


@pytest.mark.parametrize("binary", [False, True])
def test_files_of_datasets_and_plain_binary(shard_options, image_folder, tmp_path, binary):
    samples, file = captioned(image_folder), tmp_path / "one" / "train-00000-of-00001.parquet"
    if binary:
        images, captions = [image for _, image, _ in samples], [text for *_, text in samples]
        write(file, pyarrow.table({"img": images, "caption": captions}), (10,))
        rows = opened(shard_options, train_shards=str(file), image_column="img", caption_column="caption")
    else:
        rows = opened(shard_options, train_shards=write_by_datasets(file, samples))
    assert len(rows) == 10
    image, caption = rows.column_names
    for index, (_, content, text) in enumerate(samples):
        assert (rows[index][image]["bytes"], rows[index][caption]) == (content, text)
        assert image_size(rows, image, index) == read_image(rows, image, index).size[::-1]
    assert row_name(rows, image, 5) == "5 (row 5 of row group 0 in train-00000-of-00001.parquet)"


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_each_row_group_is_read_once_in_an_epoch(shard_options, tmp_path, reads, limit):
    place = to_memory(tmp_path / "shards", "flaky", "parquet")
    rows = opened(shard_options, train_shards=place, shard_cache_gb=limit)
    assert len(reads) == 2  # the footers
    reads.clear()
    assert [row_name(rows, "image", row) for row in range(10)]
    assert not reads
    for row in ShardShuffle([shard.rows for shard in rows.shards.all], 2, make_generator):
        assert rows[row]["image"]["bytes"]
        rows.select_columns(["text"])[row]["text"]
    assert len(reads) == 3 * 3  # images, captions and the end of the footer, of three row groups
    reads.clear()
    again = opened(shard_options, train_shards=place, shard_cache_gb=limit)
    again[0]["text"]
    assert len(reads) == (0 if limit else 3)
    assert (tmp_path / "run" / "cache" / "shard_data").exists() == bool(limit)


def test_workers_that_are_spawned_get_no_tables(shard_options):
    rows = opened(shard_options)
    size = len(pickle.dumps(rows))
    text = rows[0]["text"]
    copy = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) == size
    assert copy[0]["text"] == text


def test_row_groups_without_rows_are_left_out(shard_options, image_folder, tmp_path):
    samples = captioned(image_folder)
    first = write(tmp_path / "empty" / "0.parquet", table(samples[:0]), ())
    write(tmp_path / "empty" / "1.parquet", table(samples[:5]), (0, 2, 0, 3))
    rows = opened(shard_options, train_shards=f"{tmp_path}/empty/*.parquet")
    assert [(group.number, group.rows) for group in rows.shards.all] == [(1, 2), (3, 3)]
    assert [row["text"] for row in map(rows.__getitem__, range(5))] == [text for *_, text in samples[:5]]
    with pytest.raises(ValueError, match="contains no sample"):
        check_images(opened(shard_options, train_shards=first), configured(shard_options))


def test_captions_that_are_null_are_counted_and_empty(shard_options, tmp_path, capsys):
    samples = [("a", b"", None), ("b", b"", "snow"), ("c", b"", None)]
    file = write(tmp_path / "a.parquet", table(samples), (2, 1))
    rows = opened(shard_options, train_shards=file)
    assert [captions_as_list(rows[row]["text"]) for row in range(3)] == [[""], ["snow"], [""]]
    assert "rows of --train_shards without text, which get the empty caption: 2" in capsys.readouterr().out


def test_lists_of_captions(shard_options, tmp_path):
    content = pyarrow.table({"image": [b"", b"", b""], "text": [["one", None, "two"], [], None]})
    rows = opened(shard_options, train_shards=write(tmp_path / "a.parquet", content, (3,)))
    assert [captions_as_list(rows[row]["text"]) for row in range(3)] == [["one", "two"], [""], [""]]


def test_images_that_are_null_are_counted_or_met_on_the_way(shard_options, tmp_path, capsys):
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "far.png"}, None]
    content = pyarrow.table({"image": images, "text": ["a", "b", "c"]})
    changes = {"train_shards": write(tmp_path / "a.parquet", content, (1, 2))}
    rows = opened(shard_options, **changes)
    said = r"1 row groups of .*a\.parquet are incomplete:\s+row group 1 \(2 of 2 rows have no image\) in a\.parquet"
    with pytest.raises(ValueError, match=said):
        check_images(rows, configured(shard_options, **changes))
    assert list(check_images(rows, configured(shard_options, **changes, on_bad_image="skip"))) == [0, 1, 2]
    for row in (1, 2):
        with pytest.raises(
            ImageError, match=r"cannot read image row \d of row group 1 in a\.parquet: it is null, or a"
        ):
            read_image(rows, "image", row)


# -- what is refused before any work


@pytest.mark.parametrize("processes", [1, 2])
def test_an_unknown_column_is_refused_before_any_work(shard_options, processes, monkeypatch, tmp_path):
    config = configured(shard_options, caption_column="caption", pretrained_model_name_or_path="nowhere")
    said = r"0\.parquet has the columns image, text; --caption_column='caption' is not one of them\."
    with pytest.raises(ValueError, match=said):
        train(config)
    write(tmp_path / "shards" / "1.parquet", pyarrow.table({"image": [b""], "caption": ["a"]}), (1,))
    with pytest.raises(ValueError, match=r"1\.parquet has the columns image, caption; --caption_column='text'"):
        opened(shard_options)


def test_a_cache_that_is_too_small_for_what_is_shuffled_is_refused(shard_options):
    sizes = [group.size for group in opened(shard_options).shards.all]
    largest = sum(sorted(sizes)[1:])
    said = (
        r"--shard_cache_gb=1e-05 is less than the .* GB that --shuffle_shards=2 row groups need.* the largest, row "
        r"group \d of \d\.parquet, takes .* GB"
    )
    with pytest.raises(ValueError, match=said):
        opened(shard_options, shard_cache_gb=1e-5)
    opened(shard_options, shard_cache_gb=(largest + 1) / 1e9)
    opened(shard_options, shard_cache_gb=0.0)


def test_a_disk_that_is_too_full_for_the_cache_is_refused(shard_options, monkeypatch):
    usage = shard_cache.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"--shard_cache_gb=20: .*shard_data has .* GB too little space for the"):
        opened(shard_options)
    assert len(opened(shard_options, shard_cache_gb=0.0)) == 10


def test_footers_are_shared_by_processes_and_stored_once(shard_options, monkeypatch):
    config = configured(shard_options)
    read, urls = parquet_shards.read_footer, []
    monkeypatch.setattr(parquet_shards, "read_footer", lambda url, size: urls.append(url) or read(url, size))
    for rank in range(2):
        processes = Processes()
        processes.rank, processes.size = rank, 2
        index_shards(config, processes)
        assert len(urls) == rank + 1
    rows = opened(shard_options)
    assert rows[0]["text"]
    assert len(urls) == 2
    damaged = sorted(config.cache_folder.rglob("*.footer"))[0]
    damaged.write_bytes(b"")
    opened(shard_options)
    assert len(urls) == 3
    assert damaged.stat().st_size > 0


# -- files that change


def test_the_fingerprint_is_of_names_sizes_and_places(shard_options, image_folder, tmp_path):
    def sha256(**changes):
        rows = opened({**shard_options, **changes})
        return _data_sha256(rows, range(len(rows)), "image")

    first = sha256()
    moved = write_parquet(tmp_path / "moved", captioned(image_folder))
    assert sha256(train_shards=moved) == first
    samples = captioned(image_folder)
    samples[9] = (samples[9][0], samples[9][1], samples[9][2] + "!")
    assert sha256(train_shards=write_parquet(tmp_path / "caption", samples)) != first
    assert sha256(train_shards=write_parquet(tmp_path / "groups", captioned(image_folder), ((3, 4), (3,)))) != first
    assert sha256(train_shards=moved.replace("{0..1}", "0")) != first


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_that_changes_while_it_is_in_use_is_noticed(shard_options, image_folder, tmp_path, dry_run):
    rows = opened(shard_options, dry_run=dry_run)
    assert rows[9]["text"]
    write_parquet(tmp_path / "shards", captioned(image_folder), ((3, 4), (2,)))
    with pytest.raises(
        ShardError, match=r"0\.parquet (changed while it was in use|cannot be read: the server returned)"
    ):
        rows[0]["text"]
    assert rows[9]["text"]  # is stored, or in memory
    rows.shards.all = [dataclasses.replace(group, footer="of another file") for group in rows.shards.all]
    with pytest.raises(ShardError, match=r"0\.parquet changed while it was in use"):
        rows[0]["text"]


# -- classes


def classed(tmp_path, labels, name="a.parquet", feature=None):
    """A file of images with labels in two row groups."""
    content = pyarrow.table({"image": [b""] * len(labels), "label": labels})
    if feature is not None:
        features = datasets.Features({"image": datasets.Value("binary"), "label": feature})
        content = content.cast(features.arrow_schema)
    return write(tmp_path / name, content, (1, len(labels) - 1))


def pixel_config(small_run, file, **changes):
    return PixelTrainingConfig(**{**small_run, "train_shards": str(file), "class_column": "label", **changes})


NAMES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("labels", "feature", "expected", "names"),
    [
        ([1, 0, 1], NAMES, [1, 0, 1], ["cat", "dog"]),
        ([0, 2, 1], None, [0, 2, 1], None),
        (["dog", "cat", "dog"], None, [1, 0, 1], ["cat", "dog"]),
        (pyarrow.array(["dog", "cat", "dog"]).dictionary_encode(), None, [1, 0, 1], ["cat", "dog"]),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_classes(small_run, tmp_path, labels, feature, expected, names, dry_run):
    rows = open_rows(pixel_config(small_run, classed(tmp_path, labels, feature=feature), dry_run=dry_run))
    classes = read_classes(rows, "label")
    assert (classes.labels, classes.names) == (expected, names)
    assert rows[0]["label"] == rows["label"][0]
    assert (tmp_path / "run").exists() != dry_run


def test_classes_are_read_without_images_and_stored(small_run, tmp_path, reads):
    samples = [{"bytes": bytes(100_000), "path": None}] * 3
    write(tmp_path / "big" / "0.parquet", pyarrow.table({"image": samples, "label": [0, 1, 0]}), (2, 1))
    fsspec.filesystem("flaky").pipe("/big/0.parquet", (tmp_path / "big" / "0.parquet").read_bytes())
    config = pixel_config(small_run, "flaky://big/0.parquet")
    rows = open_rows(config)
    reads.clear()
    assert rows["label"] == [0, 1, 0]
    assert len(reads) == 2 * 2  # and the end of the footer
    reads.clear()
    assert open_rows(config)["label"] == [0, 1, 0]
    assert not reads


def test_classes_of_two_files_must_be_the_same(small_run, tmp_path):
    classed(tmp_path, [0, 1], "0.parquet", NAMES)
    classed(tmp_path, [0, 1], "1.parquet", datasets.ClassLabel(names=["dog", "cat"]))
    with pytest.raises(ValueError, match=r"\.parquet: --class_column='label' is ClassLabel.* the classes of all"):
        open_rows(pixel_config(small_run, f"{tmp_path}/*.parquet"))


def test_a_row_without_class_is_named(small_run, tmp_path):
    rows = open_rows(pixel_config(small_run, classed(tmp_path, [0, None, 1])))
    with pytest.raises(ValueError, match="row 1 has no class"):
        read_classes(rows, "label")


@pytest.mark.full
def test_a_run_with_classes_is_that_on_the_same_rows_of_datasets(small_run, image_folder, tmp_path):
    labels = [number % 2 for number in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": NAMES})
    images = [{"bytes": image, "path": None} for _, image, _ in captioned(image_folder)]
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    data.to_parquet(file)
    options = {**small_run, "unet": "small-16", "validation_images": 0, "class_column": "label"}
    tasks = [
        PixelTask(PixelTrainingConfig(**options, dataset_name=str(file.parent))),
        PixelTask(PixelTrainingConfig(**options, train_shards=str(file))),
    ]
    assert tasks[0].classes == tasks[1].classes
    shown = [task.samples(range(10)).sample(3, make_generator(0)) for task in tasks]
    assert all((shown[0][name] == shown[1][name]).all() for name in shown[0])
    trained(PixelTrainingConfig(**options, train_shards=str(file)))


# -- runs


def test_rows_to_sample_are_of_as_many_row_groups_as_are_shuffled(shard_options):
    shards = opened(shard_options).shards
    for seed in range(5):
        rows = shards.rows_to_sample(random.Random(seed))
        groups = {shards._locate_row(row)[0] for row in rows}
        assert len(groups) == 2
        assert len(rows) == len(set(rows)) == sum(shards.all[group].rows for group in groups)
    assert sorted(opened(shard_options, shuffle_shards=9).shards.rows_to_sample(random.Random(0))) == [*range(10)]


@pytest.mark.full
def test_over_http_each_row_group_is_read_once_for_all_workers(shard_options, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    starts = []
    with serve_ranges(tmp_path / "shards", lambda name, start: starts.append((name, start))) as place:
        changes = {"train_shards": f"{place}/{{0..1}}.parquet", "dataloader_num_workers": 2, "max_train_steps": 5}
        over_http = trained(configured(shard_options, **changes))
    read = [(name, start) for name, start in starts if start is not None]
    # Of three row groups, images and captions; the footer of each file, and for each row group its end.
    assert len(read) == 3 * 2 + 2 + 3
    assert same(over_http, trained(configured(shard_options, max_train_steps=5, output_dir=str(tmp_path / "disk"))))


def test_over_the_hub(shard_options, image_folder, tmp_path, hub):
    samples, served = captioned(image_folder), []
    for number in range(2):
        write_by_datasets(tmp_path / "repo" / "data" / f"train-{number}.parquet", samples[5 * number :][:5])
    write_by_datasets(tmp_path / "repo" / "data" / "test-0.parquet", samples[:1])
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    with serve_dataset(tmp_path / "repo", "me/photos", served) as endpoint:
        hub(endpoint=endpoint)
        rows = opened(shard_options, train_shards="hf://datasets/me/photos/data/train-*.parquet")
        assert [rows[row]["image"]["bytes"] for row in range(10)] == [image for _, image, _ in samples]
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert {name for name, _ in served} == {"train-0.parquet", "train-1.parquet"}
    expected = []
    for name in ("train-0.parquet", "train-1.parquet"):
        content = (tmp_path / "repo" / "data" / name).read_bytes()
        group = pyarrow.parquet.read_metadata(tmp_path / "repo" / "data" / name).row_group(0)
        columns = [group.column(place).total_compressed_size for place in range(group.num_columns)]
        end = int.from_bytes(content[-8:-4], "little") + 8
        expected += [(name, size) for size in (len(content), columns[0], columns[2], end)]
    assert sorted(served) == sorted(expected)  # nothing is read ahead, nor the column of paths


def test_a_pattern_is_resolved_by_its_files(shard_options, tmp_path):
    (tmp_path / "shards" / "0.parquet").rename(tmp_path / "shards" / "0.PARQUET")
    shards = create_shards(configured(shard_options, train_shards=f"{tmp_path}/shards/*"))
    assert isinstance(shards, parquet_shards.ParquetShards)
    assert len(shards.urls) == 2

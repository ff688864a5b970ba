"""What is known of files: kept while they are as they were, and forgotten once they are not."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data import dataset
from zsnr_diffusers.training.data.dataset import check_images, hash_images, image_sha256, noise_rows, open_rows
from zsnr_diffusers.training.data.file_index import RECORD, FileIndex, file_records, is_known, row_records
from zsnr_diffusers.training.data.row_values import ImageHashes, ImageSizes
from zsnr_diffusers.utils.images import ImageError

NAMES = [f"{number}.png" for number in range(5)]


@pytest.fixture
def folder(tmp_path):
    """Five images of five sizes, with captions."""
    for number, name in enumerate(NAMES):
        Image.new("RGB", (16 + number, 20), (number, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a hill")
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """Rows whose images were decoded or hashed, in two lists."""
    seen = {"decoded": [], "hashed": []}

    def spy(work, into):
        return lambda rows, column, index: into.append(index) or work(rows, column, index)

    monkeypatch.setattr(dataset, "read_image", spy(dataset.read_image, seen["decoded"]))
    monkeypatch.setattr(dataset, "image_sha256", spy(dataset.image_sha256, seen["hashed"]))
    return seen


def start(folder, read, rehash=False):
    """A start of a run: sizes and hashes of its images, and which rows were decoded and hashed for it."""
    for seen in read.values():
        seen.clear()
    config = TrainingConfig(pretrained_model_name_or_path="b", train_data_dir=str(folder), on_bad_image="skip")
    rows, index = open_rows(config), FileIndex(folder / "cache" / "files.npy", rehash=rehash)
    sizes = check_images(rows, config, progress=False, index=index)
    hashes = hash_images(rows, "image", [*sizes], index)
    return dict(sizes), dict(hashes), sorted(read["decoded"]), sorted(read["hashed"])


def test_what_has_not_changed_is_not_opened_again(folder, read):
    sizes, hashes, *first = start(folder, read)
    assert first == [[0, 1, 2, 3, 4]] * 2
    assert sizes == {number: (20, 16 + number) for number in range(5)}
    assert start(folder, read) == (sizes, hashes, [], [])
    assert start(folder, read, rehash=True) == (sizes, hashes, *first)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_read_anew(folder, read, change):
    _, before, *_ = start(folder, read)
    path = folder / NAMES[2]
    times = path.stat()
    if change == "size":
        Image.new("RGB", (99, 98)).save(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size != times.st_size
    else:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    sizes, hashes, decoded, hashed = start(folder, read)
    assert (decoded, hashed) == ([2], [2])
    assert sizes[2] == ((98, 99) if change == "size" else (20, 18))
    assert (hashes[2] == before[2]) == (change == "time")
    assert {row: hashes[row] for row in (0, 1, 3, 4)} == {row: before[row] for row in (0, 1, 3, 4)}


def test_damage_that_leaves_size_and_time_shows_when_the_image_is_read(folder, read):
    start(folder, read)
    path = folder / NAMES[3]
    times = path.stat()
    path.write_bytes(bytes(times.st_size))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert 3 in start(folder, read)[0]
    config = TrainingConfig(pretrained_model_name_or_path="b", train_data_dir=str(folder))
    with pytest.raises(ImageError, match=NAMES[3]):
        dataset.read_image(open_rows(config), "image", 3)
    sizes, _, decoded, _ = start(folder, read, rehash=True)
    assert (3 in sizes, decoded) == (False, [0, 1, 2, 3, 4])


def test_bad_images_are_never_taken_for_known_ones(folder, read):
    (folder / NAMES[0]).write_bytes(b"no image")
    for _ in range(2):
        sizes, hashes, decoded, _ = start(folder, read)
        assert sizes.keys() == hashes.keys() == {1, 2, 3, 4}
        assert 0 in decoded


@pytest.mark.parametrize("content", [b"", b"no table", None], ids=["empty", "text", "of another format"])
def test_a_damaged_table_is_replaced(folder, read, content):
    sizes, hashes, *first = start(folder, read)
    file = folder / "cache" / "files.npy"
    file.write_bytes(content) if content is not None else np.save(file, np.zeros(4))
    assert start(folder, read) == (sizes, hashes, *first)
    assert start(folder, read) == (sizes, hashes, [], [])


def test_several_runs_write_to_one_table(folder):
    file, paths = folder / "files.npy", [str(folder / name) for name in NAMES]
    one, other = FileIndex(file), FileIndex(file)
    for index, part, field in ((one, paths[:3], "height"), (other, paths[2:], "sha256")):
        records = file_records(part)
        records[field] = 7
        index.store(records)
    found = FileIndex(file).fill(file_records(paths))
    assert is_known(found, "height").tolist() == [True, True, True, False, False]
    assert is_known(found, "sha256").tolist() == [False, False, True, True, True]


def test_nothing_is_written_where_it_must_not_or_cannot_be(folder):
    records = file_records([str(folder / name) for name in NAMES])
    records["height"] = 3
    for index in (FileIndex(folder / "a.npy", read_only=True), FileIndex(folder / NAMES[0] / "files.npy")):
        index.store(records)
        assert is_known(index.fill(file_records([str(folder / NAMES[1])])), "height").all()  # kept for this run
    assert not (folder / "a.npy").exists()


def test_images_inside_a_data_set_go_by_its_fingerprint(tmp_path, read):
    """Rows whose images have no file: the same data set is known, another one is not."""
    config = TrainingConfig(pretrained_model_name_or_path="b", train_data_dir="d")
    for resolution, decoded in ((8, 8), (8, 0), (12, 8), (8, 0)):
        read["decoded"].clear()
        rows, index = noise_rows("image", resolution), FileIndex(tmp_path / "files.npy")
        assert set(check_images(rows, config, False, index).values()) == {(resolution, resolution)}
        assert len(read["decoded"]) == decoded
        hashes = hash_images(rows, "image", range(8), index)
        assert {row: image_sha256(rows, "image", row) for row in range(8)} == hashes
    keys = row_records("a", np.arange(10**5))["key"].tolist() + row_records("b", np.arange(10**5))["key"].tolist()
    assert len(set(keys)) == 2 * 10**5


FACTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)), max_size=8)


@given(st.lists(FACTS, max_size=6))
def test_a_table_is_a_dictionary_by_file_and_state(tmp_path_factory, writes):
    """`height` and `sha256` of the last write that knew them, as long as the state stayed the same since."""
    file, expected = tmp_path_factory.mktemp("table") / "files.npy", {}
    for facts in writes:
        rows = {key: (size, height, sha) for key, size, height, sha in facts}
        records = np.zeros(len(rows), RECORD)
        for place, (key, (size, height, sha)) in enumerate(rows.items()):
            records[place] = (key, size, 0, height, height, sha)
            old = expected.get(key, (size, 0, 0))
            kept = old if old[0] == size else (size, 0, 0)
            expected[key] = (size, height or kept[1], sha or kept[2])
        FileIndex(file).store(records)
    asked = np.zeros(30, RECORD)
    asked["key"], asked["size"] = np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10)
    found = FileIndex(file).fill(asked)
    for record in found:
        size, height, sha = expected.get(int(record["key"]), (-1, 0, 0))
        known = (height, sha) if size == record["size"] else (0, 0)
        assert (record["height"], record["width"], record["sha256"][0]) == (known[0], *known)


@given(st.dictionaries(st.integers(0, 2**40), st.tuples(st.integers(1, 9999), st.integers(1, 9999)), max_size=20))
def test_sizes_in_arrays_are_the_mapping_that_they_were(sizes):
    found = ImageSizes.of(sizes)
    assert found == sizes
    assert [*found] == sorted(sizes)
    assert 2**50 not in found
    assert [*found.first(3)] == sorted(sizes)[:3]
    hashes = ImageHashes(found.rows, np.arange(32 * len(sizes), dtype=np.uint8).reshape(-1, 32))
    assert all(len(hashes[row]) == 32 for row in sizes)

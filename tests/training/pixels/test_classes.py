import datasets
import pytest

from zsnr_diffusers.training.pixels.classes import read_classes


def rows(values, feature=None):
    data = datasets.Dataset.from_dict({"label": values})
    return data if feature is None else data.cast_column("label", feature)


def test_classes_are_what_the_data_says_they_are():
    named = read_classes(rows([1, 0, 1], datasets.ClassLabel(names=["cat", "dog", "owl"])), "label")
    assert (named.labels, named.names, named.count) == ([1, 0, 1], ["cat", "dog", "owl"], 3)
    words = read_classes(rows(["owl", "cat", "owl"]), "label")
    assert (words.labels, words.names, words.count) == ([1, 0, 1], ["cat", "owl"], 2)
    numbers = read_classes(rows([4, 0]), "label")
    assert (numbers.labels, numbers.names, numbers.count) == ([4, 0], None, 5)
    assert [words.name(1), numbers.name(4)] == ["owl", "4"]


def test_numbers_may_leave_classes_of_the_network_out():
    assert read_classes(rows([4, 0]), "label", count=10).count == 10


@pytest.mark.parametrize(
    ("values", "feature", "count", "message"),
    [
        ([0, None], None, None, "row 1 has no class"),
        ([0, -1], None, None, "row 1 has class -1; classes must be from 0 to 0"),
        ([0, -1], datasets.ClassLabel(names=["a"]), None, "row 1 has class -1; classes must be from 0 to 0"),
        ([0, 10], None, 10, "row 1 has class 10; classes must be from 0 to 9"),
        ([0.5], None, None, r"holds float, row 0 0\.5; classes must be words, or numbers starting from 0"),
        ([True], None, None, "holds bool"),
        (["a", "b"], None, 3, "The data has 2 classes, the network has 3"),
        ([0], datasets.ClassLabel(names=["a", "b", "c", "d"]), 3, "The data has 4 classes, the network has 3"),
    ],
)
def test_what_is_no_class_is_refused(values, feature, count, message):
    data = rows(values)
    if feature is not None:
        data = data.cast_column("label", datasets.Value("int64")).cast_column("label", feature)
    with pytest.raises(ValueError, match=message):
        read_classes(data, "label", count)

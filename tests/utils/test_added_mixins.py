import pytest

from zsnr_diffusers.utils.added_mixins import add_mixin, plain_class, remove_mixin


class One:
    def what(self):
        return ["one", *super().what()]


class Two:
    def what(self):
        return ["two", *super().what()]


class Plain:
    def what(self):
        return ["plain"]


class Own(One, Plain):
    pass


@pytest.mark.parametrize("order", [(One, Two), (Two, One)])
def test_they_come_off_in_any_order(order):
    for first in order:
        target = Plain()
        for mixin in order:
            add_mixin(target, mixin)
        assert target.what() == [mixin.__name__.lower() for mixin in order[::-1]] + ["plain"]
        assert type(target).__name__ == "Plain"
        assert plain_class(type(target)) is Plain
        others = [mixin for mixin in order if mixin is not first]
        assert remove_mixin(target, first)
        assert target.what() == [others[0].__name__.lower(), "plain"]
        assert not remove_mixin(target, first)
        assert remove_mixin(target, others[0])
        assert type(target) is Plain


def test_one_that_a_class_has_by_itself_stays():
    target = Own()
    add_mixin(target, One)
    assert type(target) is Own
    assert not remove_mixin(target, One)
    add_mixin(target, Two)
    assert target.what() == ["two", "one", "plain"]
    assert plain_class(type(target)) is Own
    remove_mixin(target, Two)
    assert type(target) is Own


def test_twice_is_once():
    target = Plain()
    add_mixin(target, One)
    add_mixin(target, One)
    assert target.what() == ["one", "plain"]

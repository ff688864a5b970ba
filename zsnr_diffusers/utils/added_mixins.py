"""Mixins that are put on a live object and taken off again, in any order; its class keeps its name."""

from typing import Any


def add_mixin(target: Any, mixin: type) -> None:
    """Put a mixin before the classes of an object, unless it has it already."""
    cls = type(target)
    if not issubclass(cls, mixin):
        _set_class(target, plain_class(cls), (mixin, *_added(cls)))


def remove_mixin(target: Any, mixin: type) -> bool:
    """Take off a mixin that `add_mixin` put on; False if it did not."""
    cls = type(target)
    others = tuple(added for added in _added(cls) if added is not mixin)
    if others == _added(cls):
        return False
    _set_class(target, plain_class(cls), others)
    return True


def plain_class(cls: type) -> type:
    """A class without the mixins that `add_mixin` put before it."""
    plain: type = vars(cls).get("_without_mixins", cls)
    return plain


def _added(cls: type) -> tuple[type, ...]:
    """The mixins that `add_mixin` put before a class, the last one first."""
    mixins: tuple[type, ...] = vars(cls).get("_added_mixins", ())
    return mixins


def _set_class(target: Any, plain: type, mixins: tuple[type, ...]) -> None:
    """Give an object the class `plain` with mixins before it."""
    # Named like its base: the name is what diffusers writes to model_index.json and shows in messages.
    names = {"__module__": plain.__module__, "_added_mixins": mixins, "_without_mixins": plain}
    target.__class__ = type(plain.__name__, (*mixins, plain), names) if mixins else plain

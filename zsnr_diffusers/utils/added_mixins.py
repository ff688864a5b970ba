"""Add mixins to a live object and remove them again, in any order; its class keeps its name."""

from typing import Any


def add_mixin(target: Any, mixin: type) -> None:
    """Add a mixin in front of an object's class, unless it has it already."""
    cls = type(target)
    if not issubclass(cls, mixin):
        _set_class(target, plain_class(cls), (mixin, *_added(cls)))


def remove_mixin(target: Any, mixin: type) -> bool:
    """Remove a mixin that `add_mixin` added; returns False if there was none."""
    cls = type(target)
    others = tuple(added for added in _added(cls) if added is not mixin)
    if others == _added(cls):
        return False
    _set_class(target, plain_class(cls), others)
    return True


def plain_class(cls: type) -> type:
    """A class without the mixins that `add_mixin` added."""
    plain: type = vars(cls).get("_without_mixins", cls)
    return plain


def _added(cls: type) -> tuple[type, ...]:
    """The mixins that `add_mixin` added to a class, the last one first."""
    mixins: tuple[type, ...] = vars(cls).get("_added_mixins", ())
    return mixins


def _set_class(target: Any, plain: type, mixins: tuple[type, ...]) -> None:
    """Set an object's class to `plain` with mixins in front of it."""
    # Named like its base: the name is what diffusers writes to model_index.json and shows in messages.
    names = {"__module__": plain.__module__, "_added_mixins": mixins, "_without_mixins": plain}
    target.__class__ = type(plain.__name__, (*mixins, plain), names) if mixins else plain

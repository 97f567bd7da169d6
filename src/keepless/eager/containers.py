"""Lists, dictionaries, sets and queues as they were: copied, compared, put back in place."""

from __future__ import annotations

import collections
from typing import Any

KINDS = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque)
_DEPTH = 4
_MANY = 4096


class Content:
    """What a list, dict, set or queue held, with the contents of those in it.

    Attributes:
        container: the object itself.
        items: a shallow copy of it.
        inner: the contents of the containers among its items.
    """

    __slots__ = ("container", "inner", "items")

    def __init__(self, container: Any, depth: int = 0) -> None:
        self.container = container
        self.items = container.copy()
        held = container.values() if isinstance(container, dict) else container
        deeper = depth < _DEPTH and len(container) <= _MANY
        self.inner = [Content(item, depth + 1) for item in held if item.__class__ in KINDS] if deeper else []

    def is_now(self) -> bool:
        """Whether the container, and all in it, holds the same objects."""
        return _same(self.container, self.items) and all(content.is_now() for content in self.inner)

    def put_back(self) -> None:
        """Makes it so."""
        if isinstance(self.container, list):
            self.container[:] = self.items
        elif isinstance(self.container, collections.deque):
            self.container.clear()
            self.container.extend(self.items)
        else:
            self.container.clear()
            self.container.update(self.items)
        for content in self.inner:
            content.put_back()


def content_of(value: Any) -> Content | None:
    """The content of a list, dict, set or queue; None for anything else."""
    return Content(value) if value.__class__ in KINDS else None


def cloned(value: Any, depth: int = 0) -> Any:
    """A list, dict, set or queue with copies of those in it; anything else as it is."""
    kind = value.__class__
    if kind not in KINDS or depth > _DEPTH:
        return value
    if kind is dict:
        return {key: cloned(item, depth + 1) for key, item in value.items()}
    if kind is list:
        return [cloned(item, depth + 1) for item in value]
    return value.copy()


def _same(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(key in other and other[key] is value for key, value in one.items())
    if isinstance(one, set):
        return bool(one == other)
    return all(a is b for a, b in zip(one, other, strict=True))

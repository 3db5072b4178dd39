"""In which order blocks go when room is needed: the least recently used first, pinned ones after all others.

Names only: what a block is, where its bytes are and whether somebody holds it is for the owner of an order to know.
Memory has one order for everybody and one per tenant; the disk has one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class EvictionOrder:
    """A set of names. Every operation is O(1)."""

    def __init__(self) -> None:
        self._ordinary: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self._pinned: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ordinary) + len(self._pinned)

    def __contains__(self, name: bytes) -> bool:
        return name in self._ordinary or name in self._pinned

    def __iter__(self) -> Iterator[bytes]:
        """From the first to go to the last."""
        yield from self._ordinary
        yield from self._pinned

    @property
    def pinned(self) -> int:
        return len(self._pinned)

    def add(self, name: bytes, pinned: bool) -> None:
        """The name was used just now, whether it was in here or not."""
        self.discard(name)
        (self._pinned if pinned else self._ordinary)[name] = None

    def touch(self, name: bytes) -> None:
        """A name that is in here was used just now."""
        (self._pinned if name in self._pinned else self._ordinary).move_to_end(name)

    def discard(self, name: bytes) -> None:
        self._ordinary.pop(name, None)
        self._pinned.pop(name, None)

    def first(self) -> bytes:
        """The name that goes first; it stays in. Raises StopIteration when there is none."""
        return next(iter(self))

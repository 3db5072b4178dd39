"""What one router has still to be told of the names that a worker's KV cache can be hit for.

    snapshot ──► restart ─┐
                          ├─► pending: name -> whether it can be hit ──► take ──► CacheChange, a page at a time
    changes ────► add ────┘

The last word on a name is kept and none before it, so what is pending is bounded by itself and may be sent in any
order. A router that reads too slowly loses it all and is told everything anew once it reads again. No clock, no
network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from cluster.messages import CacheChange
from kvstore.blocks import Change

PAGE = 4_096  # names in one frame: 128 KiB


class CacheChanges:
    """Begins by wanting a snapshot. `limit` is how many names may wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: dict[bytes, bool] = {}  # name -> whether it can be hit; in the order of the first word on it
        self._reset = False  # the next page begins a snapshot
        self.lost = True  # only a snapshot will do

    def __len__(self) -> int:
        """Names that wait to be told."""
        return len(self._pending)

    @property
    def urgent(self) -> bool:
        """A snapshot begins, or more waits than goes into one frame."""
        return self._reset or len(self._pending) >= PAGE

    def restart(self, names: Sequence[bytes]) -> None:
        """A snapshot: these are all that can be hit; what is added from now on happened later."""
        self._pending = dict.fromkeys(names, True)
        self._reset, self.lost = True, False

    def add(self, changes: Iterable[Change]) -> None:
        """As `BlockPool` tells them. Too many: all are dropped, and `lost` is set."""
        if self.lost:
            return
        for names, there in changes:
            self._pending.update(dict.fromkeys(names, there))
        if len(self._pending) > self._limit:
            self._pending.clear()
            self._reset, self.lost = False, True

    def take(self) -> CacheChange | None:
        """What goes into the next frame; None: nothing."""
        if not self._pending and not self._reset:
            return None
        page = list(islice(self._pending.items(), PAGE))
        if len(page) == len(self._pending):
            self._pending.clear()
        else:
            for name, _ in page:
                del self._pending[name]
        reset, self._reset = self._reset, False
        put, delete = (b"".join(name for name, there in page if there is wanted) for wanted in (True, False))
        return CacheChange(put, delete, reset)

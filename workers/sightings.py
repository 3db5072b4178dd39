"""Which prompt blocks this worker was asked for before: the second time, a block is worth a place in the store.

Most prompts are asked for once, and writing them all would push what is shared out of the store. Bounded: what was not
seen for long is forgotten and starts again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

CAPACITY = 65_536  # hashes: about 6 MB, a million tokens of prompts


class Sightings:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # least recently seen first

    def see(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of the chain had been seen before; from now on all of them have."""
        before = next((i for i, name in enumerate(hashes) if name not in self._seen), len(hashes))
        for name in hashes:
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return before

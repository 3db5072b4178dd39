"""Each node's block store, in names: what it has, what goes when room is needed, who has the longest run of a prompt.

The index is exact here, because a store's word is taken when it is asked; what the router believes is late instead
(`SimSettings.cache_s`). Least recently used blocks go first, tails before heads (`kvstore/eviction.py`).
"""

from __future__ import annotations

from kvstore.blocks import Change
from kvstore.eviction import EvictionOrder


class Stores:
    """`capacity` blocks on each node; 0: there are none."""

    def __init__(self, nodes: int, capacity: int) -> None:
        self.capacity = capacity
        self.changes: list[list[Change]] = [[] for _ in range(nodes)]  # node -> as BlockPool's
        self._orders = [EvictionOrder() for _ in range(nodes)]  # node -> its names
        self._nodes: dict[bytes, int] = {}  # block -> mask of the nodes that have it

    def write(self, node: int, names: list[bytes]) -> None:
        """The node's store takes these blocks of a chain, or counts them as used."""
        order, changes, bit = self._orders[node], self.changes[node], 1 << node
        new: list[bytes] = []
        gone: list[bytes] = []
        for name in reversed(names):
            if name not in order:
                self._nodes[name] = self._nodes.get(name, 0) | bit
                new.append(name)
            order.add(name, pinned=False)
        while len(order) > self.capacity:
            name = order.first()
            order.discard(name)
            mask = self._nodes[name] & ~bit
            if mask:
                self._nodes[name] = mask
            else:
                del self._nodes[name]
            gone.append(name)
        changes += [(changed, there) for changed, there in ((new, True), (gone, False)) if changed]

    def local(self, node: int, names: list[bytes], start: int) -> int:
        """How many leading blocks there would be with those of the node's own store, of `start` that are there."""
        order = self._orders[node]
        upto = start
        while upto < len(names) and names[upto] in order:
            upto += 1
        return upto

    def remote(self, names: list[bytes], start: int) -> tuple[int, int]:
        """(leading blocks there would be with those of the best store, its node); (start, -1): nobody has any."""
        upto, running = start, -1
        while upto < len(names):
            mask = running & self._nodes.get(names[upto], 0)
            if not mask:
                break
            running, upto = mask, upto + 1
        return (upto, (running & -running).bit_length() - 1) if upto > start else (start, -1)

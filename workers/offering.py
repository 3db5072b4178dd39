"""Which blocks of a worker's cache go to the store outside handoffs, and when; bookkeeping, not the writing.

    decode fills a block ─────────► the whole chain: the next turn of a conversation asks for it
    a prompt is seen again ───────► as much of it as was seen before
    blocks get scarce ────────────► the oldest, a little at a time, ahead of their eviction
    the worker gives requests up ─► all that they have

Every block is offered once. One that is on its way has a reference of its own until `written` is called for it.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from kvstore.blocks import BlockPool
from workers.sequence import Sequence
from workers.sightings import Sightings
from workers.step import Offload

LOW = 8  # an eighth of the pool: with fewer expendable blocks than that, the oldest go to the store ahead of eviction
COLD_BATCH = 16  # blocks on their way there at a time


class Offering:
    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._sightings = Sightings()
        self._cold = 0  # blocks on their way to the store ahead of their eviction
        self.under_way: set[int] = set()  # blocks on their way there for any reason

    def see(self, sequence: Sequence) -> None:
        """A prompt has come, with its hashes: was it here before?"""
        if sequence.handoff is None and not sequence.transfer_id:
            sequence.repeated = self._sightings.see(sequence.hashes[: sequence.prompt_length // self._block_size])

    def computed(self, sequence: Sequence) -> list[Offload]:
        """Leading blocks of a prompt that was asked for before, and all of them as soon as decode has filled one, which
        is worth nothing without those before it."""
        handed_off = bool(sequence.transfer_id)
        if handed_off and sequence.exact:
            return []  # all of them go with the handoff; an approximate one's are for its reader only
        decoded = sequence.registered * self._block_size > sequence.prompt_length
        return self._leading(sequence, sequence.registered if decoded or handed_off else sequence.repeated)

    def all_of(self, sequence: Sequence) -> list[Offload]:
        """What there is of a sequence that somebody else will go on with."""
        return self._leading(sequence, sequence.registered)

    def oldest(self) -> list[Offload]:
        """What will be evicted next, if it is time to think of that."""
        if self._cold or self._pool.expendable_count >= self._pool.total // LOW:
            return []
        count = max(1, min(COLD_BATCH, self._pool.total // (4 * LOW)))
        return self._offer(self._pool.oldest_unoffered(count), cold=True)

    def written(self, offloads: Several[Offload]) -> None:
        """These were written to the store, or could not be; a second attempt is not made."""
        self._pool.free([offload.block for offload in offloads if not offload.cold])
        cold = [offload.block for offload in offloads if offload.cold]
        self._pool.free(cold, oldest=True)
        self._cold -= len(cold)
        self.under_way.difference_update(offload.block for offload in offloads)

    def _leading(self, sequence: Sequence, upto: int) -> list[Offload]:
        upto = min(sequence.registered, upto)
        # by hash: when the sequence computed a block that was there already, the other one is that which has the name
        blocks = [self._pool.find(name) for name in sequence.hashes[sequence.offered : upto]]
        sequence.offered = max(sequence.offered, upto)
        return self._offer([block for block in blocks if block is not None], cold=False)

    def _offer(self, block_ids: list[int], cold: bool) -> list[Offload]:
        offloads = [Offload(block, name, cold) for block, name in self._pool.offer(block_ids)]
        blocks = [offload.block for offload in offloads]
        self._pool.retain(blocks)
        self.under_way.update(blocks)
        self._cold += len(blocks) if cold else 0
        return offloads

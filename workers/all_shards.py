"""Copies between the blocks of a worker of several shards and the stores: every shard moves its own part of each block.

    what was sealed, received or fetched      the MIN over the shards; the first token only when all have everything
    bad blocks                                reported by whoever saw them
    checksums                                 put together cell by cell

That the parts are the whole, each cell once, is proved before any byte moves. Of shards that hold the same KV heads one
writes, by turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.errors import ModelError
from cluster.messages import Handoff
from cluster.shard_messages import FetchBlocks, FollowBlocks, WriteBlocks, Written
from cluster.store_messages import Slab
from kvstore.client import StoreClient
from kvstore.fetcher import Fetched, Source
from kvstore.layout import Layout, tiles, whole
from kvstore.reader import Received
from workers.block_mover import BlockMover
from workers.shard import Shard, Sizes, shards
from workers.shard_answers import error_meant, fetched, packed, received, stored_run
from workers.shard_peers import ShardPeers


class AllShards:
    """`own` is the shard in this process, rank 0; the others are asked over `peers`. `exact`: which kind of stores."""

    def __init__(self, own: BlockMover, shard: Shard, peers: ShardPeers, *, exact: bool) -> None:
        self.layout = own.layout
        self._own = own
        self._peers = peers
        self._exact = exact
        self._shards = holders(self.layout, shard.tp, shard.pp)
        if self._shards[shard.rank].rectangle != shard.rectangle:
            raise ModelError(f"shard {shard.rank} does not have the KV heads and layers that its block layout means")
        prove_tiling(self.layout, self._shards)

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> Sequence[bytes]:
        """Raises what any of the shards raised once none copies any more."""
        turns = [[i for i, block in enumerate(blocks) if shard.writes(block)] for shard in self._shards]
        number, asked = self._peers.number(), {}
        for rank, turn in enumerate(turns[1:], start=1):
            if turn:
                ids, theirs = packed([blocks[i] for i in turn]), tuple(slabs[i] for i in turn)
                store = (client.address, client.epoch, client.client_id)
                asked[rank] = WriteBlocks(number, *store, transfer_id, self._exact, ids, theirs)
        mine = [blocks[i] for i in turns[0]], [slabs[i] for i in turns[0]]
        sums, answers = await self._peers.together(self._own.write(client, transfer_id, *mine), asked)
        cells = np.empty((len(blocks), self.layout.heads, self.layout.layers), "<u4")
        _place(cells, self._shards[0], turns[0], sums)
        for rank, written in answers.items():
            assert isinstance(written, Written)
            if (error := error_meant(written.code, written.message)) is not None:
                raise error
            _place(cells, self._shards[rank], turns[rank], written.checksums)
        return [block.tobytes() for block in cells]

    async def follow(
        self, handoff: Handoff, start: int, tokens: int, table: Sequence[int], timeout_s: float
    ) -> Received:
        number, ms = self._peers.number(), int(1000 * timeout_s)
        message = FollowBlocks(number, handoff, start, tokens, packed(table), ms)
        own = self._own.follow(handoff, start, tokens, table, timeout_s)
        mine, answers = await self._peers.together(own, self._all(message), timeout_s)
        return merged_receipt([mine, *map(received, answers.values())])

    async def fetch(
        self, sources: Sequence[Source], hashes: Sequence[bytes], table: Sequence[int], timeout_s: float
    ) -> Fetched:
        number, ms, names = self._peers.number(), int(1000 * timeout_s), tuple(hashes[: sources[-1].stop])
        runs = tuple(map(stored_run, sources))
        message = FetchBlocks(number, self._exact, runs, names, packed(table), ms)
        own = self._own.fetch(sources, hashes, table, timeout_s)
        mine, answers = await self._peers.together(own, self._all(message), timeout_s)
        return merged_fetch(sources, [mine, *map(fetched, answers.values())])

    async def close(self) -> None:
        await self._own.close()

    def _all(self, message: FollowBlocks | FetchBlocks) -> dict[int, FollowBlocks | FetchBlocks]:
        return dict.fromkeys(range(1, len(self._shards)), message)


# ------------------------------------------------------------------------------------------------- who has what; pure
def holders(layout: Layout, tp: int, pp: int) -> tuple[Shard, ...]:
    """All shards, as far as KV is concerned: that depends on the block alone, so the other sizes are made to fit."""
    return shards(Sizes(layout.heads * tp, layout.heads, layout.layers, tp, tp), tp, pp)


def prove_tiling(layout: Layout, ranks: Sequence[Shard]) -> None:
    """That whatever block is written, each of its cells is by exactly one shard. Raises ModelError."""
    for turn in range(math.lcm(*(shard.replicas for shard in ranks))):
        writers = [shard.rectangle for shard in ranks if shard.writes(turn)]
        if not tiles(layout, writers, whole(layout)):
            raise ModelError(f"the shards' parts are not the whole of block {turn}, which is a bug: {writers}")


# -------------------------------------------------------------------------------------------------------- merges; pure
def merged_receipt(ranks: Sequence[Received]) -> Received:
    """What all have is there; what broke first is the error."""
    least = min(ranks, key=lambda rank: (rank.valid_blocks, rank.error is None))
    everything = all(rank.error is None for rank in ranks)
    return Received(
        least.valid_blocks,
        ranks[0].first_token if everything else None,
        sum(rank.bytes for rank in ranks),
        max(rank.seconds for rank in ranks),
        least.error or next((rank.error for rank in ranks if rank.error is not None), None),
    )


def merged_fetch(sources: Sequence[Source], ranks: Sequence[Fetched]) -> Fetched:
    """As `merged_receipt`; a source gave what it gave to all, in the time and on the path of the slowest."""
    least = min(ranks, key=lambda rank: (rank.valid_blocks, rank.error is None))
    parts: list[tuple[Source, int, float]] = []
    for source in sources:
        tried = [part for rank in ranks for part in rank.parts if part[0].start == source.start]
        if tried:
            slowest = max(tried, key=lambda part: part[2])
            blocks = min(part[1] for part in tried) if len(tried) == len(ranks) else 0
            parts.append((slowest[0], blocks, slowest[2]))
    error = least.error or next((rank.error for rank in ranks if rank.error is not None), None)
    return Fetched(least.valid_blocks, tuple(parts), error)


def _place(cells: Any, shard: Shard, turn: Sequence[int], checksums: Sequence[bytes]) -> None:
    """The checksums of a shard's part of the blocks `turn`, into those of whole blocks [blocks, heads, layers]."""
    r = shard.rectangle
    part = np.frombuffer(b"".join(checksums), "<u4").reshape(len(turn), r.head1 - r.head0, r.layer1 - r.layer0)
    cells[list(turn), r.head0 : r.head1, r.layer0 : r.layer1] = part

"""The seam between what a worker decides about blocks in stores and the copies: done by one shard, or by all of them.

Rank 0 reserves and seals, looks blocks up and decides what to fetch; whoever has a part of the blocks copies that part
itself. `OwnBlocks` is the shard in this process, and the whole of a worker that has one; `AllShards` is several.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.messages import Handoff
from cluster.store_messages import Slab
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.fetcher import BlockFetcher, Fetched, Source
from kvstore.layout import Layout
from kvstore.reader import HandoffReader, Received
from kvstore.slab_writer import SlabWriter
from workers.stored_blocks import StoredBlocks


class BlockMover(Protocol):
    """A `kvstore.slab_writer.BlockSource` that also reads. Whatever way an operation ends, nothing reads or writes the
    blocks for it any more once it has; `table` maps places in a sequence to block ids."""

    layout: Layout  # of whole blocks in the stores

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> Sequence[bytes]: ...

    async def follow(
        self, handoff: Handoff, start: int, tokens: int, table: Sequence[int], timeout_s: float
    ) -> Received:
        """Fill the blocks `start`.. of a sequence from a handoff, as they are sealed. The handoff is the caller's to
        release. It never fails, it only receives less; as `fetch`."""
        ...

    async def fetch(
        self, sources: Sequence[Source], hashes: Sequence[bytes], table: Sequence[int], timeout_s: float
    ) -> Fetched:
        """Fill the blocks of the sources, which are consecutive, out of the stores; `hashes` is the whole chain."""
        ...

    async def close(self) -> None:
        """When no operation is under way."""
        ...


class OwnBlocks:
    """The shard in this process. It reads over `connections`, which are their owner's to close."""

    def __init__(self, blocks: StoredBlocks, connections: Connections) -> None:
        self.layout = blocks.layout
        self._blocks = blocks
        self._reader = HandoffReader(connections, blocks.part)
        self._fetcher = BlockFetcher(connections, blocks.part)

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> Sequence[bytes]:
        """The checksums of this shard's part of each block."""
        writer = SlabWriter(self._blocks.part, self._blocks.reader(blocks))
        return await writer.write(client, transfer_id, blocks, slabs)

    async def follow(
        self, handoff: Handoff, start: int, tokens: int, table: Sequence[int], timeout_s: float
    ) -> Received:
        landing = self._blocks.landing(table, start, -(-tokens // self.layout.tokens))
        received = await self._reader.follow(handoff, start, tokens, landing.write, timeout_s)
        await landing.accept(received.valid_blocks)
        return received

    async def fetch(
        self, sources: Sequence[Source], hashes: Sequence[bytes], table: Sequence[int], timeout_s: float
    ) -> Fetched:
        start = sources[0].start
        landing = self._blocks.landing(table, start, sources[-1].stop)
        fetched = await self._fetcher.fetch(sources, hashes, landing.write, timeout_s)
        arrived = time.monotonic()
        await landing.accept(fetched.valid_blocks)
        return _with_acceptance(fetched, (time.monotonic() - arrived) / max(1, fetched.valid_blocks - start))

    async def close(self) -> None:
        await self._fetcher.close()


def _with_acceptance(fetched: Fetched, block_s: float) -> Fetched:
    """Whoever predicts what a fetch takes must know of that too."""
    parts = tuple((source, blocks, seconds + blocks * block_s) for source, blocks, seconds in fetched.parts)
    return replace(fetched, parts=parts)

"""A shard's blocks where its KV cache is in a GPU's memory: packed there, copied through pinned memory, many at a time.

    out   cache ─ gather ─► packed, on the device ─ one copy ─► pinned ─► stores        batches are read ahead, in the
    in    stores ─► pinned ─ one copy ─► packed, on the device ─ scatter ─► cache       order that was announced

One block is a few KiB of small models and 2 MiB of large ones; copied one by one, small ones get a tenth of the bus.
Copies have a stream of their own. They need no event from the steps: blocks are read after the step that wrote them was
collected, and what was written is there before anybody is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.block_copy import gather_blocks, scatter_blocks
from kvstore.copying import Block, in_thread
from kvstore.layout import Layout
from kvstore.part import Part
from workers.device import DeviceCache
from workers.shard import Shard

BATCH_BYTES = 16 * 2**20  # copied at once: long enough for a bus's full speed, short enough to be copied on meanwhile
PROGRAMS = 32  # of a GPU's 132 processors or so: enough for the bus, and steps hardly notice


class DeviceBlocks:
    """A `workers.stored_blocks.StoredBlocks`: byte for byte. `layout` is that of whole blocks."""

    def __init__(self, cache: DeviceCache, layout: Layout, shard: Shard) -> None:
        self.layout = layout
        self.part = Part(layout, shard.rectangle)
        self._cache = cache
        self.batch = max(1, BATCH_BYTES // self.part.own.block_bytes)  # blocks

    def read(self, block: int) -> Block:
        return self.reader([block])(block)

    def reader(self, blocks: Sequence[int]) -> Callable[[int], Block]:
        return _ReadAhead(self, blocks)

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landed:
        return Landed(self, table, start, stop)

    # ----------------------------------------------------------------------------------------------- in any thread
    def gather(self, blocks: Sequence[int]) -> Block:  # [N, part.own.block_bytes]
        """Their bytes, in memory that belongs to whoever keeps the answer."""
        host = self.staging(len(blocks))
        with torch.inference_mode(), self._cache.device.copying():
            packed = self._packed(len(blocks))
            gather_blocks(self._cache.blocks, self._ids(blocks), packed, PROGRAMS)
            host.copy_(_bytes(packed), non_blocking=True)
        gathered: Block = host.numpy()
        return gathered

    def scatter(self, blocks: Sequence[int], source: Tensor) -> None:  # [N, part.own.block_bytes] of `staging`
        with torch.inference_mode(), self._cache.device.copying():
            packed = self._packed(len(blocks))
            _bytes(packed).copy_(source, non_blocking=True)
            scatter_blocks(self._cache.blocks, self._ids(blocks), packed, PROGRAMS)

    def staging(self, count: int) -> Tensor:  # [count, part.own.block_bytes]
        size = self.part.own.block_bytes
        return self._cache.device.staging(count * size).view(count, size)

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int32, device=self._cache.blocks.device)

    def _packed(self, count: int) -> Tensor:
        cache = self._cache.blocks
        return torch.empty((count, cache[0].numel()), dtype=cache.dtype, device=cache.device)


def _bytes(packed: Tensor) -> Tensor:
    return packed.view(torch.uint8)


class _ReadAhead:
    """Reads blocks that are asked for in an order known before. One thread at a time."""

    def __init__(self, source: DeviceBlocks, blocks: Sequence[int]) -> None:
        self._source = source
        self._blocks = blocks
        self._places = {block: place for place, block in enumerate(blocks)}
        self._read: dict[int, Block] = {}  # of the last batch

    def __call__(self, block: int) -> Block:
        if block not in self._read:
            first = self._places[block]
            batch = self._blocks[first : first + self._source.batch]
            self._read = dict(zip(batch, self._source.gather(batch), strict=True))
        return self._read[block]


class Landed:
    """A `workers.stored_blocks.Landing`: pinned memory, batch by batch as it is written to, until it is accepted."""

    def __init__(self, target: DeviceBlocks, table: Sequence[int], start: int, stop: int) -> None:
        self._target, self._table, self._start, self._stop = target, table, start, stop
        self._batches: dict[int, Tensor] = {}  # number -> [blocks, bytes]
        self._lock = threading.Lock()  # streams write side by side

    def write(self, position: int) -> Block:
        number, index = divmod(position - self._start, self._target.batch)
        with self._lock:
            if number not in self._batches:
                first, last = self._span(number, self._stop)
                self._batches[number] = self._target.staging(last - first)
        block: Block = self._batches[number][index].numpy()
        return block

    async def accept(self, stop: int) -> None:
        if stop > self._start:
            await in_thread(partial(self._copy, stop))
        self._batches.clear()

    def _copy(self, stop: int) -> None:
        for number in range(-(-(stop - self._start) // self._target.batch)):
            first, last = self._span(number, stop)
            self._target.scatter(list(self._table[first:last]), self._batches[number][: last - first])

    def _span(self, number: int, stop: int) -> tuple[int, int]:
        """Places [first, last) of the table."""
        first = self._start + number * self._target.batch
        return first, min(first + self._target.batch, stop)

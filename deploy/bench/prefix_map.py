"""What it costs a router to know which worker has which block: lookups, changes, memory; and a worker to say so.

A lookup is worst when every worker has another part of the prompt, and best when all that have any have the same.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial

from cluster.store_messages import BlockKey
from deploy.bench.report import Figure, median, seconds
from kvstore.blocks import BlockPool, Change
from kvstore.prefix_map import PrefixMap
from workers.cache_changes import CacheChanges

SECTION = "prefix map"
WORKERS = (64, 1_000)
PROMPTS = (256, 2_000)  # blocks
KNOWN = 200_000  # blocks in the map whose memory is measured
POOL = 20_000  # blocks of a worker
PAGE = 256  # blocks in a change
REPEATS = 15
MICRO = 1e6


def measure() -> list[Figure]:
    chance = random.Random(1)
    hashes = _hashes(max(PROMPTS))
    figures = []
    for workers in WORKERS:
        for title, depths in (("all have all", [len(hashes)]), ("each has another part", range(len(hashes) + 1))):
            filled = _filled(workers, hashes, partial(chance.choice, depths))
            for blocks in PROMPTS:
                value, spread = _repeated(partial(filled.lookup, hashes[:blocks]))
                name = f"lookup, {blocks} blocks, {workers} workers, {title}"
                figures.append(Figure(SECTION, name, value, "us", spread=spread, lower_is_better=True))
    return figures + _changes(chance) + _telling()


def _repeated(work: Callable[[], object]) -> tuple[float, float]:
    """Its time in microseconds, and the spread of that."""
    return median([MICRO * seconds(work) for _ in range(REPEATS)])


def _hashes(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


def _filled(workers: int, hashes: Sequence[bytes], depth: Callable[[], int]) -> PrefixMap:
    filled = PrefixMap()
    for owner in [filled.join() for _ in range(workers)]:
        filled.put(owner, hashes[: depth()])
    return filled


def _changes(chance: random.Random) -> list[Figure]:
    """Learning what many workers have, and what one block takes of memory, its hash included."""
    filled = PrefixMap()
    owners = [filled.join() for _ in range(64)]
    tracemalloc.start()
    pages = [_hashes(PAGE) for _ in range(KNOWN // PAGE)]
    for page in pages:
        filled.put(chance.choice(owners), page)
    del page
    pages.clear()
    size = tracemalloc.get_traced_memory()[0] / len(filled)
    tracemalloc.stop()
    value, spread = median(
        [MICRO * seconds(partial(filled.put, owners[0], _hashes(PAGE))) / PAGE for _ in range(REPEATS)]
    )
    return [
        Figure(SECTION, "a block that is new", value, "us", spread=spread, lower_is_better=True),
        Figure(SECTION, "memory per block", size, "bytes", lower_is_better=True),
    ]


def _telling() -> list[Figure]:
    """On a worker's engine thread: a block that gets a name while another loses it, and a snapshot of all names."""
    keys = [BlockKey(name, 16) for name in _hashes(2 * POOL)]
    heard: list[Change] = []
    silent, told = (seconds(partial(_churn, pool, keys)) for pool in (BlockPool(POOL), BlockPool(POOL, heard)))
    pool = BlockPool(POOL)
    _churn(pool, keys)
    value, spread = _repeated(pool.names)
    changes = CacheChanges(2 * POOL)
    changes.restart(pool.names())
    page = MICRO * seconds(changes.take)
    return [
        Figure(SECTION, "a block and its eviction, noted", MICRO * max(0.0, told - silent) / len(keys), "us"),
        Figure(SECTION, f"snapshot of {POOL} names", value, "us", spread=spread, lower_is_better=True),
        Figure(SECTION, "a page of it, for a frame", page, "us", lower_is_better=True),
    ]


def _churn(pool: BlockPool, keys: Sequence[BlockKey]) -> None:
    for key in keys:
        blocks = pool.allocate(1) or []
        pool.register(blocks[0], key, "")
        pool.free(blocks)

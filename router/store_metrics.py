"""The metrics of block stores and of the index: what stores hold and did, how far behind this router's copy is.

Declarations, each with what reads it, and the samples of one scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric

from cluster.messages import StoreInfo
from cluster.store_messages import StoreStat
from kvstore.mirror import MirrorStat
from router.families import Family, counter, gauge

BY_STORE = ("store",)
STATES = ("free", "reserved", "held", "cached", "quarantined")

UP = gauge("tandem_store_up", BY_STORE, "0, 1", "1 when the store answered", "store lost")
SLABS = gauge(
    "tandem_store_slabs", ("store", "state"), "blocks",
    "of the arena: free, reserved (for a writer), held (by a transfer or reader), cached, quarantined (a hung writer"
    " may still write there). They add up to the arena", "served",
)  # fmt: skip
STATS: tuple[tuple[Family, Callable[[StoreStat], float]], ...] = (
    (gauge("tandem_store_block_bytes", BY_STORE, "bytes", "of one block", "steady"), lambda stat: stat.block_bytes),
    (gauge("tandem_store_transfers", BY_STORE, "handoffs", "under way", "expired"), lambda stat: stat.transfers),
    (
        gauge("tandem_store_pinned_blocks", BY_STORE, "blocks", "cached ones that are evicted last", "pinned"),
        lambda stat: stat.pinned,
    ),
    (gauge("tandem_store_disk_blocks", BY_STORE, "blocks", "on disk", "written"), lambda stat: stat.disk_blocks),
    (gauge("tandem_store_disk_bytes", BY_STORE, "bytes", "on disk", "written"), lambda stat: stat.disk_bytes),
    (
        gauge("tandem_store_disk_limit_bytes", BY_STORE, "bytes", "size of the disk tier; 0: there is none", "steady"),
        lambda stat: stat.disk_limit_bytes,
    ),
    (
        counter("tandem_store_sealed_bytes_total", BY_STORE, "bytes", "of KV written and sealed", "served"),
        lambda stat: stat.sealed_bytes_total,
    ),
    (
        counter("tandem_store_evictions_total", BY_STORE, "blocks", "evicted from memory", "evicted"),
        lambda stat: stat.evictions_total,
    ),
    (
        counter("tandem_store_expired_total", BY_STORE, "handoffs", "whose hold ran out", "expired"),
        lambda stat: stat.expired_total,
    ),
    (
        counter("tandem_store_disk_writes_total", BY_STORE, "blocks", "written to disk", "written"),
        lambda stat: stat.disk_writes_total,
    ),
    (
        counter("tandem_store_disk_reads_total", BY_STORE, "blocks", "read from disk", "evicted"),
        lambda stat: stat.disk_reads_total,
    ),
    (
        counter(
            "tandem_store_disk_errors_total", BY_STORE, "blocks",
            "that could not be written, or whose files are unreadable or corrupt", "corrupt",
        ),
        lambda stat: stat.disk_errors_total,
    ),
    (
        counter("tandem_store_found_blocks_total", BY_STORE, "blocks", "that workers asked for: here", "fetched"),
        lambda stat: stat.found_blocks_total,
    ),
    (
        counter("tandem_store_missed_blocks_total", BY_STORE, "blocks", "that workers asked for: not here", "served"),
        lambda stat: stat.missed_blocks_total,
    ),
    (
        counter("tandem_store_fetched_blocks_total", BY_STORE, "blocks", "sent to workers outside handoffs", "fetched"),
        lambda stat: stat.fetched_blocks_total,
    ),
    (
        counter(
            "tandem_store_corrupt_blocks_total", BY_STORE, "blocks", "dropped because their bytes did not match",
            "corrupt",
        ),
        lambda stat: stat.corrupt_total,
    ),
)  # fmt: skip
INDEX: tuple[tuple[Family, Callable[[MirrorStat], float]], ...] = (
    (
        gauge("tandem_index_blocks", (), "blocks", "in this router's copy of the index", "served"),
        lambda mirror: mirror.blocks,
    ),
    (
        gauge(
            "tandem_index_behind_seconds", (), "seconds",
            "since that copy was known to be complete; up to 1 is well", "redis lost",
        ),
        lambda mirror: mirror.behind_s,
    ),
    (
        counter("tandem_index_events_total", (), "events", "changes of the index followed", "served"),
        lambda mirror: mirror.events_total,
    ),
    (
        counter("tandem_index_gaps_total", (), "gaps", "times that changes were missed", "redis lost"),
        lambda mirror: mirror.gaps_total,
    ),
    (
        counter("tandem_index_snapshots_total", (), "snapshots", "times that the copy was made anew", "redis lost"),
        lambda mirror: mirror.snapshots_total,
    ),
)  # fmt: skip

FAMILIES = (UP, SLABS, *(family for family, _ in STATS), *(family for family, _ in INDEX))


def collect(stores: Sequence[tuple[StoreInfo, StoreStat | None]], mirror: MirrorStat | None) -> Iterator[Metric]:
    yield UP.metric(([store.id], float(stat is not None)) for store, stat in stores)
    stats = [(store.id, stat) for store, stat in stores if stat is not None]
    yield SLABS.metric(([store, state], getattr(stat, state)) for store, stat in stats for state in STATES)
    for family, read in STATS:
        yield family.metric(([store], read(stat)) for store, stat in stats)
    if mirror is not None:
        for family, say in INDEX:
            yield family.metric([([], say(mirror))])

"""Which block stores a node runs: those of exact KV and, with int8 (`kv_quantization`), as many again for
approximate KV. Where all KV is in 8 bits, these are the only stores.

Both kinds share the node's `store_memory` and `disk_memory` half and half; they are strangers to each other in every
other way. Decides, starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config
from cluster.identity import Identity
from deploy import disk_tier
from kvstore.layout import Layout


@dataclass(frozen=True, slots=True)
class StoreSet:
    """The stores of one kind on any node. Sizes are bytes of each store."""

    name: str  # beginning of their ids
    layout: Layout
    identity: Identity
    memory: int
    disk_folders: tuple[Path | None, ...]  # by index on the node; None: without a disk tier
    disk_memory: int


def store_sets(config: Config, layout: Layout, identity: Identity, disk: Path | None) -> list[StoreSet]:
    """`disk` is the folder of the disk tier, if there is one."""
    kinds = [("store", layout, identity, "")]
    if config.kv_quantization == "int8":
        kinds.append(("tier", layout.int8, identity.approximate, "int8-"))
    share = len(kinds) * config.stores
    return [
        StoreSet(
            name,
            stored,
            where,
            config.store_memory // share,
            tuple(disk_tier.store_folder(disk, index, kind) for index in range(config.stores)),
            config.disk_memory // share,
        )
        for name, stored, where, kind in kinds
    ]

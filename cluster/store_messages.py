"""The words that writers and readers of KV blocks say to a block store.

worker -> store    Hello, Reserve, Put, Seal, Finish, Revoke, Session
reader -> store    Hello, Hold, Release;  Follow, Fetch -> stream of Fragments, then one FollowEnd
anybody -> store   StatRequest -> StoreStat
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hello:
    client_id: str
    layout: bytes  # kvstore.layout.Layout.fingerprint
    hash_vectors: bytes  # kvstore.hashing.vectors_digest()


@dataclass(frozen=True, slots=True)
class Welcome:
    epoch: int
    machine: str  # boot id: equal on client and store means shared memory can be mapped
    arena: str  # path of the arena file
    slabs: int


@dataclass(frozen=True, slots=True)
class BlockKey:
    """A block by name, and what the name was made of, so that anybody can verify it (`kvstore.hashing.block_hash`)."""

    hash: bytes  # 32 bytes; empty for the partial last block, which is never published
    tokens: int
    parent: bytes = b""  # hash of the block before it, or the root
    ids: bytes = b""  # its token ids, u32le


@dataclass(frozen=True, slots=True)
class Reserve:
    """Space for a whole handoff, or nothing."""

    transfer_id: str
    client_id: str
    blocks: tuple[BlockKey, ...]
    hold_ms: int
    tenant: str = ""  # whose blocks these are, opaque: the unit of quotas


@dataclass(frozen=True, slots=True)
class Slab:
    index: int
    generation: int
    sealed: bool  # the store holds these bytes already: nothing to copy


@dataclass(frozen=True, slots=True)
class Reserved:
    slabs: tuple[Slab, ...]


@dataclass(frozen=True, slots=True)
class Sealed:
    position: int  # index of the block within the transfer
    checksums: bytes  # u32le CRC-32 per (head, layer) cell, head-major


@dataclass(frozen=True, slots=True)
class Seal:
    transfer_id: str
    blocks: tuple[Sealed, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The writer is done; `first_token` is what it sampled after the last prompt token (None: nothing was)."""

    transfer_id: str
    first_token: int | None


@dataclass(frozen=True, slots=True)
class Revoke:
    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    transfer_id: str
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Held:
    remaining_ms: int


@dataclass(frozen=True, slots=True)
class Release:
    transfer_id: str


@dataclass(frozen=True, slots=True)
class Session:
    """Lives as long as the writer's process: when it closes, what that writer had not sealed is revoked."""

    client_id: str


@dataclass(frozen=True, slots=True)
class Follow:
    """Blocks `start`.. of a transfer, each as soon as it is sealed; pinned while the stream is open."""

    transfer_id: str
    epoch: int
    start: int
    inline: bool  # True: bytes come in the frames; False: the reader maps the arena
    rectangle: tuple[int, ...] = ()  # what comes inline: head0, head1, layer0, layer1; empty: whole blocks


@dataclass(frozen=True, slots=True)
class Fragment:
    position: int
    tokens: int
    slab: Slab
    checksums: bytes  # of the cells that were asked for, with the last part
    offset: int  # of `data` within the bytes of the block, or of the rectangle of it that was asked for
    data: bytes | memoryview  # empty when the reader maps the arena
    last: bool  # last part of this block


@dataclass(frozen=True, slots=True)
class Fragments:
    """Several at once, in order: every message has a price of its own."""

    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Bytes for slabs that the transfer has reserved and not sealed, from a shard on another machine than the store's.
    Of each fragment `slab`, `offset` within the whole block and `data`, whole cells, count."""

    transfer_id: str
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class FollowEnd:
    first_token: int | None
    code: str  # empty when the transfer is whole, else an error code of `cluster.errors`
    message: str


@dataclass(frozen=True, slots=True)
class Find:
    """Which leading blocks of a chain the store has."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Found:
    tiers: bytes  # MEMORY or DISK for each block of the longest prefix that is there


MEMORY, DISK = 0, 1


@dataclass(frozen=True, slots=True)
class Fetch:
    """These blocks, in this order, up to the first that is not there; pinned while the stream is open. The `position`
    of a Fragment is the block's place in `hashes`; a FollowEnd with the code of Expired says that some are missing."""

    hashes: tuple[bytes, ...]
    epoch: int
    inline: bool
    rectangle: tuple[int, ...] = ()  # as in Follow


@dataclass(frozen=True, slots=True)
class List:
    """Blocks whose hash comes after `after` in byte order and starts with `prefix`, at most `limit` of them."""

    prefix: bytes
    after: bytes
    limit: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    hash: bytes
    parent: bytes
    tokens: int
    tier: int  # MEMORY or DISK; MEMORY when it is in both
    holders: int  # transfers and readers that use it now
    pinned: bool
    tenant: str


@dataclass(frozen=True, slots=True)
class Listing:
    blocks: tuple[BlockInfo, ...]
    total: int  # blocks in the store, whatever was asked for


@dataclass(frozen=True, slots=True)
class Pin:
    """Evict these blocks last, whether they are here yet or not (`pinned` False: like all others again)."""

    hashes: tuple[bytes, ...]
    pinned: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget these blocks, in every tier, unless somebody is using them."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Recompute names and checksums of these blocks; what does not match is dropped. Also what a reader says when bytes
    that it was sent did not match."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """How many blocks it concerned: pinned, dropped, or found to be corrupt."""

    blocks: int


@dataclass(frozen=True, slots=True)
class StatRequest:
    pass


@dataclass(frozen=True, slots=True)
class StoreStat:
    """Every slab is in exactly one of the five states, so they add up to `slabs`."""

    slabs: int
    free: int
    reserved: int  # handed to a writer, not sealed
    held: int  # sealed and under a hold or pin
    cached: int  # sealed, evictable
    quarantined: int  # a hung writer may still touch it
    transfers: int
    block_bytes: int
    epoch: int
    sealed_bytes_total: int
    evictions_total: int
    expired_total: int
    pinned: int = 0  # cached slabs that are evicted last
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_limit_bytes: int = 0  # 0: there is no disk tier
    disk_writes_total: int = 0
    disk_reads_total: int = 0
    disk_errors_total: int = 0  # failed or skipped writes, unreadable or corrupt files
    found_blocks_total: int = 0  # of the blocks that Find asked for, those that were here
    missed_blocks_total: int = 0  # ... and those that were not
    fetched_blocks_total: int = 0  # sent by Fetch, in whichever way
    corrupt_total: int = 0  # blocks dropped because their bytes did not match

"""The words that writers and readers of KV blocks say to a block store.

worker -> store    Hello, Reserve, Seal, Finish, Revoke, Session
reader -> store    Hello, Hold, Release;  Follow -> stream of Fragment, then one FollowEnd
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
    hash: bytes  # 32 bytes; empty for the partial last block, which is never published
    tokens: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Space for a whole handoff, or nothing."""

    transfer_id: str
    client_id: str
    blocks: tuple[BlockKey, ...]
    hold_ms: int


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


@dataclass(frozen=True, slots=True)
class Fragment:
    position: int
    tokens: int
    slab: Slab
    checksums: bytes
    offset: int  # of `data` within the block's bytes
    data: bytes  # empty when the reader maps the arena
    last: bool  # last frame of this block


@dataclass(frozen=True, slots=True)
class FollowEnd:
    first_token: int | None
    code: str  # empty when the transfer is whole, else an error code of `cluster.errors`
    message: str


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

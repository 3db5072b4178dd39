"""The words within one worker: between rank 0, which schedules and serves, and its other shards.

rank 0 -> shard    over the control connection: Begin once, then one StepPlan per step, in order
shard -> rank 0    Joined, then Loaded or Failed;  from the last stage's first rank also one StepResult per step
rank 0 -> shard    over gRPC: WriteBlocks, FollowBlocks, FetchBlocks, CancelBlocks: copies between its part of the
                   blocks and the stores

Arrays travel as bytes, i32le, because a message has a price per value.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.messages import Generation, Handoff
from cluster.store_messages import Slab


@dataclass(frozen=True, slots=True)
class Joined:
    """The first word of a shard."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Begin:
    """All shards have joined: build the links between them, load."""

    rendezvous: str  # where rank 0 listens for the links


@dataclass(frozen=True, slots=True)
class Loaded:
    """The shard's weights are in memory and its KV cache is there: it follows plans from now on."""

    address: str  # where it serves gRPC


@dataclass(frozen=True, slots=True)
class Failed:
    """The shard cannot serve. `code` is an error code of `cluster.errors`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence that the shards hear of for the first time, or again after it was preempted. Tokens beyond the
    generation's and all of its blocks come as the new ones of its chunks."""

    slot: int  # names it in plans, until it is in `ended`
    generation: Generation


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, and what changed about whom since the last plan."""

    number: int
    ended: bytes  # [N] slots to forget, before anything else
    admitted: tuple[Admitted, ...]
    chunks: bytes  # [chunks, 5] slot, first position, positions to compute, tokens that are new, blocks that are new
    tokens: bytes  # the new tokens of every chunk's sequence, one chunk after the other
    blocks: bytes  # the new blocks of every chunk's block table, likewise


@dataclass(frozen=True, slots=True)
class StepResult:
    number: int
    tokens: bytes  # [chunks] the next token, -1 for a chunk that does not sample


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Copy the shard's part of blocks into slabs that are reserved for `client_id`; those that it does not write (see
    `workers.shard.Shard.writes`) are left out by rank 0."""

    operation: int  # names it in CancelBlocks
    store: str
    epoch: int
    client_id: str
    transfer_id: str
    exact: bool  # which kind of stores
    blocks: bytes  # [N] block ids
    slabs: tuple[Slab, ...]  # [N]


@dataclass(frozen=True, slots=True)
class Written:
    checksums: tuple[bytes, ...]  # [N] of the cells of the shard's part, in the order of its own memory
    code: str = ""  # empty: all is written; else an error code of `cluster.errors`, and nothing is
    message: str = ""


@dataclass(frozen=True, slots=True)
class FollowBlocks:
    """Fill the shard's part of a sequence's blocks from a handoff. The handoff is released by rank 0."""

    operation: int
    handoff: Handoff
    start: int  # blocks before it are there already
    tokens: int
    table: bytes  # [blocks]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Followed:
    valid_blocks: int
    first_token: int | None
    bytes: int
    seconds: float
    code: str  # empty: everything came
    message: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """`kvstore.fetcher.Source` on the wire."""

    store: str
    epoch: int
    start: int
    stop: int
    path: str


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Fill the shard's part of a sequence's blocks from what stores have."""

    operation: int
    exact: bool
    sources: tuple[StoredRun, ...]
    hashes: tuple[bytes, ...]  # the whole chain, up to the last source's stop
    table: bytes  # [blocks]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class FetchedRun:
    source: StoredRun
    blocks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchedBlocks:
    valid_blocks: int
    parts: tuple[FetchedRun, ...]
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class CancelBlocks:
    """End an operation early. Its own answer still comes, when nothing reads or writes blocks for it any more."""

    operation: int

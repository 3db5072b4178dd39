"""What comes out of one engine step, in the words of whoever acts on it.

Every list is work that the engine does not do itself: tokens to deliver, blocks to send, fetch or write, questions to
ask. Blocks named in here carry a reference of their own until the engine is told that the work has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.messages import Handoff, JobFailed, TokenOutput
from kvstore.blocks import Change, Name
from kvstore.fetcher import Source
from workers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Send:
    """Blocks of a prefill that are complete and go to the store; `Engine.sent` takes them back."""

    transfer_id: str
    blocks: list[tuple[int, int]]  # (position in the transfer, block id)
    last: bool  # the prefill is done; `first_token` follows its last token
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class BlockFetch:
    """Fill these blocks of a sequence from the stores that have them; `Engine.fetched` takes them back."""

    sequence: Sequence
    sources: tuple[Source, ...]  # consecutive
    table: list[int]  # the sequence's block table as it was when the blocks were allocated
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Offload:
    """A full block to be written to the store, outside any handoff; `Engine.offloaded` takes it back."""

    block: int
    name: Name
    cold: bool  # nobody uses it and it would be evicted soon


@dataclass(frozen=True, slots=True)
class Step:
    outputs: list[tuple[str, TokenOutput | JobFailed]] = field(default_factory=list)  # (router id, output)
    sends: list[Send] = field(default_factory=list)
    receives: list[Sequence] = field(default_factory=list)  # their handoffs are to be received
    fetches: list[BlockFetch] = field(default_factory=list)
    lookups: list[Sequence] = field(default_factory=list)  # preempted: what do stores have of them? see Engine.located
    offloads: list[Offload] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)  # transfers whose prefill will not finish
    dropped: list[str] = field(default_factory=list)  # ids of sequences that ended while their blocks were arriving
    unclaimed: list[Handoff] = field(default_factory=list)  # handoffs of sequences that ended before they were fetched
    # what became of names that can be hit since the step before, in order
    cache: list[Change] = field(default_factory=list)
    names: list[bytes] | None = None  # every hash that can be hit, after `cache`, where that was asked for
    # tokens of the step that was submitted or, when there was nothing to submit, of the one that was collected;
    # 0: nothing to do until an event arrives
    computed: int = 0

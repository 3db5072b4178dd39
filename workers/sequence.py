"""The noun that travels through an engine: one generation, its tokens and its blocks.

waiting ──► running ──► finished          `computed` counts tokens whose KV is in this worker's blocks.
 │   ▲         │ ▲                        A step computes `take` of the gap behind them; when the gap closes, the
 │   └─────────┘ │ preempted              runner's token is appended and the gap is one again: prefill, decode,
 └─► receiving ──┘                         prefix hit and resume are the same thing.
     (blocks arrive: a handoff's, or what stores have)

    tokens   |── computed ──|── in flight ──|── gap ──|      steps in flight will turn the middle into computed ones
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cluster.messages import Generation, Handoff
from cluster.store_messages import BlockKey
from kvstore.fetcher import Source
from kvstore.hashing import block_keys


class State(Enum):
    RECEIVING = "receiving"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation inside one engine. Only the engine and its scheduler change it."""

    generation: Generation
    router_id: str
    root: bytes  # parent hash of the first block: model, dtype, tenant
    deadline: float  # on this process's monotonic clock, seconds
    exact: bool = True  # False: it may use approximate KV, so its own is approximate; its root says so too
    transfer_id: str = ""  # set: a prefill job; its blocks go to the store and it ends at its first token
    handoff: Handoff | None = None
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)  # prompt, then output
    computed: int = 0
    in_flight: int = 0  # tokens after those, in steps that were submitted and not collected
    pending: int = 0  # tokens that these steps choose, and that the next one may go on from without their being known
    cached: int = 0  # tokens that did not have to be computed when first scheduled: on the device, or fetched
    block_table: list[int] = field(default_factory=list)  # position // block_size -> block id
    hashes: list[bytes] = field(default_factory=list)  # chain hashes of the full blocks, as far as known
    registered: int = 0  # leading blocks that prefix hits can already use
    emitted: int = 0  # tokens this worker delivered
    sent: int = 0  # blocks announced to the handoff writer
    locating: bool = False  # stores are being asked what they have of it; it is not admitted meanwhile
    sources: list[Source] = field(default_factory=list)  # what they answered
    repeated: int = 0  # leading blocks of the prompt that this worker was asked for before
    offered: int = 0  # leading blocks that were offered to the store, outside handoffs
    preempted: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*self.generation.prompt, *self.generation.output]

    @property
    def id(self) -> str:
        return self.generation.id

    @property
    def prompt_length(self) -> int:
        return len(self.generation.prompt)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, over all attempts."""
        return len(self.tokens) - self.prompt_length

    def keys(self, start: int, stop: int, block_size: int) -> list[BlockKey]:
        """Names of its full blocks start..stop, with what they are made of. Their hashes must be known."""
        return block_keys(self.hashes, self.root, self.tokens, block_size, start, stop)

    @property
    def gap(self) -> int:
        """Tokens whose KV is missing and which no step in flight computes. 0: its next token is in flight."""
        return len(self.tokens) + self.pending - self.computed - self.in_flight

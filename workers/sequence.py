"""The noun that travels through an engine: one generation, its tokens and its blocks.

waiting ──► running ──► finished          `computed` counts tokens whose KV is in this worker's blocks.
   ▲  ▲        │                          A step computes `take` of the gap len(tokens) - computed; when the gap
   │  └────────┘ preempted                closes, the runner's token is appended and the gap is one again:
receiving (a handoff is arriving)         prefill, decode, prefix hit and resume are the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cluster.messages import Generation, Handoff


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
    transfer_id: str = ""  # set: a prefill job; its blocks go to the store and it ends at its first token
    handoff: Handoff | None = None
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)  # prompt, then output
    computed: int = 0
    cached: int = 0  # tokens hit in this worker's own blocks when first scheduled
    block_table: list[int] = field(default_factory=list)  # position // block_size -> block id
    hashes: list[bytes] = field(default_factory=list)  # chain hashes of the full blocks, as far as known
    registered: int = 0  # leading blocks that prefix hits can already use
    emitted: int = 0  # tokens this worker delivered
    sent: int = 0  # blocks announced to the handoff writer
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

    @property
    def gap(self) -> int:
        """Tokens whose KV is missing."""
        return len(self.tokens) - self.computed

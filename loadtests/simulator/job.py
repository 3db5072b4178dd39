"""One request of the simulation, and its legs: what a worker has to do for it.

Job ── prefill: Sequence on one worker, which ends at its first token
    └─ decode:  Sequence on another, which waits for the first one's KV (or computes the prompt itself: no prefill)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtests.simulator.trace import TraceRequest

if TYPE_CHECKING:
    from loadtests.simulator.worker import Worker


class State:
    """Plain numbers: in Python 3.11 a member of an Enum takes four times as long to get."""

    WAITING = 1
    RECEIVING = 2  # blocks arrive: a handoff's, or what stores have
    PREFILLING = 3
    DECODING = 4
    ENDED = 5


class Sequence:
    """A leg. `tokens` are known, KV of `computed` of them is in the worker's blocks; it ends with `last` tokens."""

    __slots__ = (
        "base",
        "computed",
        "finish_step",
        "grow_step",
        "handoff",
        "hit",
        "job",
        "last",
        "order",
        "registered",
        "state",
        "table",
        "tokens",
        "worker",
    )

    def __init__(self, job: Job, worker: Worker, tokens: int, last: int, handoff: bool) -> None:
        self.job = job
        self.worker = worker
        self.tokens = tokens
        self.last = last
        self.handoff = handoff  # its KV comes from the job's prefill leg
        self.state = State.WAITING
        self.computed = 0  # while it decodes: as of `base`
        self.table: list[int] = []  # position // block_size -> block id
        self.registered = 0  # leading blocks that prefix hits can use
        self.hit = -1  # tokens that it did not have to compute; -1: not admitted yet
        self.order = 0  # of its admission: less is older
        self.base = 0  # while it decodes: computed tokens minus the worker's decode steps so far
        self.finish_step = 0  # the worker's decode step after which it has ended
        self.grow_step = 0  # ... before which it needs another block


class Job:
    """`produced` tokens have been delivered; whatever happens, they are not delivered twice."""

    __slots__ = (
        "arrival_s",
        "available",
        "cached",
        "decode",
        "excluded",
        "finish_s",
        "first_token_s",
        "handed",
        "handing",
        "id",
        "last_token_s",
        "names",
        "number",
        "placements",
        "prefill",
        "produced",
        "request",
        "uncached",
    )

    def __init__(self, number: int, request: TraceRequest, arrival_s: float, names: list[bytes]) -> None:
        self.number = number
        self.id = str(number)
        self.request = request
        self.arrival_s = arrival_s
        self.names = names  # of its full blocks, the prompt's and, where the trace knows them, the output's
        self.produced = 0
        self.first_token_s = -1.0
        self.last_token_s = -1.0
        self.finish_s = -1.0
        self.cached = 0  # prompt tokens that were not computed, at its first token
        self.uncached = 0  # predicted by the placement
        self.placements = 0
        self.excluded: frozenset[str] = frozenset()  # workers that have failed it
        self.prefill: Sequence | None = None
        self.decode: Sequence | None = None
        self.available = 0  # tokens whose KV the prefill leg has in its node's store
        self.handed = 0  # of those, on the decode leg's worker
        self.handing = False  # some of them are on their way

    @property
    def tokens(self) -> int:
        """Prompt and output so far."""
        return self.request.prompt_tokens + self.produced

    @property
    def last(self) -> int:
        """Prompt and output when it has ended."""
        return self.request.prompt_tokens + self.request.output_tokens

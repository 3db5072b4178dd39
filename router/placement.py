"""Which workers serve a request: a pure function from a snapshot of the fleet to a Route.

Least loaded first. Load is counted in tokens the worker still has to compute before a new request gets its turn: queued
prompt tokens, one per running sequence, and what this router sent it that its last report cannot know of yet.

    prefill and decode workers alive   ->  Route(prefill, decode): the KV is handed over
    no worker of role prefill          ->  Route(None, decode):    the decode worker prefills itself
    only workers of role prefill       ->  Route(None, prefill worker): an engine accepts any job
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import Unavailable
from cluster.messages import Role


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker at one moment."""

    id: str
    role: Role
    running: int
    waiting_tokens: int  # uncomputed prompt tokens, as last reported
    sent_tokens: int = 0  # sent by this router since that report

    @property
    def load(self) -> int:
        return self.waiting_tokens + self.running + self.sent_tokens


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` None: the decode worker computes the prompt as well, and no KV moves."""

    prefill: str | None
    decode: str


def place(workers: Iterable[WorkerView], excluded: frozenset[str] = frozenset()) -> Route:
    """The least loaded workers for one request, without those in `excluded`, which have failed it already.

    Raises Unavailable when nobody is left; ties go to the smaller id, so that equal snapshots give equal routes.
    """
    usable = [worker for worker in workers if worker.id not in excluded]
    prefillers = [worker for worker in usable if worker.role == "prefill"]
    decoders = [worker for worker in usable if worker.role != "prefill"]
    if not decoders:
        prefillers, decoders = [], prefillers
    if not decoders:
        raise Unavailable("no worker is connected that could serve this; retry, and see /status", retry_after_s=2.0)
    return Route(_least_loaded(prefillers) if prefillers else None, _least_loaded(decoders))


def _least_loaded(workers: list[WorkerView]) -> str:
    return min(workers, key=lambda worker: (worker.load, worker.id)).id

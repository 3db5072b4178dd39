"""The noun that travels through the router once HTTP and text are done with: a request in tokens, and its answer.

Plain values; who serves them is `router/dispatch.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cluster.errors import Leaving, TandemError
from cluster.messages import FinishReason, Sampling
from cluster.telemetry import INVALID_SPAN, Span
from router.expectations import OutputLength
from router.placement import Decision


@dataclass(frozen=True, slots=True)
class Request:
    """One choice of one prompt."""

    id: str  # unique in the cluster
    prompt: tuple[int, ...]
    sampling: Sampling
    salt: bytes
    tenant: str  # opaque tag of whom it is for
    exact: bool = True  # approximate KV is not good enough
    hashes: tuple[bytes, ...] | None = None  # of the prompt's full blocks; None: whoever places it computes them
    decisions: list[Decision] = field(default_factory=list, compare=False)  # every one taken for it, in order
    exposed_s: list[float] = field(default_factory=list, compare=False)  # per handoff: waited for when all was computed
    arrival_s: float = field(default_factory=time.monotonic, compare=False)  # monotonic
    span: Span = field(default=INVALID_SPAN, compare=False)  # what its own are under, where it is traced


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens in order, none missing and none twice."""

    tokens: tuple[int, ...]
    cached_tokens: int  # prompt tokens not computed, as far as known
    finish: FinishReason | None


@dataclass(slots=True)
class Progress:
    """What has been delivered, over all attempts."""

    request: Request
    deadline: float  # monotonic seconds
    outputs: OutputLength  # what others have had lately
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    failed: set[str] = field(default_factory=set)  # ids of workers that failed this request
    left_s: float | None = None  # when the first of them said that it is about to leave, monotonic

    def failed_by(self, worker_id: str, error: TandemError) -> None:
        self.failed.add(worker_id)
        if isinstance(error, Leaving) and self.left_s is None:
            self.left_s = time.monotonic()

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def expected_tokens(self) -> int:
        """Still to come: as many as others have, until no more are allowed."""
        rest = self.request.sampling.max_tokens - len(self.tokens)
        return max(1, min(rest, self.outputs.remaining(len(self.tokens))))

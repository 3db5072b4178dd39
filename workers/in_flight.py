"""Steps that were submitted to the runner and not collected yet, oldest first: as many as the runner has stages.

Counts and times them; what is in them and what becomes of it is the scheduler's and the engine's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.runner import Chunk, Runner


@dataclass(frozen=True, slots=True)
class Collected:
    """A step that has ended."""

    chunks: list[Chunk]
    tokens: list[int | None]  # per chunk: its next token, if it samples
    # Since it was submitted or since the step before it was collected, whichever is later. Steps in flight share the
    # time that passes: so the times of a prompt's chunks add up to what the prompt took, however many were in flight.
    seconds: float


class InFlight:
    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner = runner
        self._clock = clock
        self._steps: deque[tuple[list[Chunk], float]] = deque()  # (chunks, when they were submitted)
        self._collected = float("-inf")  # when the last one was

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def full(self) -> bool:
        return len(self._steps) == self._runner.depth

    def submit(self, chunks: list[Chunk]) -> None:
        assert not self.full, f"{len(self)} steps are in flight, as many as there may be"
        self._steps.append((chunks, self._clock()))
        self._runner.submit(chunks)

    def collect(self) -> Collected:
        """End the oldest."""
        chunks, began = self._steps.popleft()
        tokens = self._runner.collect()
        began, self._collected = max(began, self._collected), self._clock()
        return Collected(chunks, tokens, self._collected - began)

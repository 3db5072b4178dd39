"""A worker's spans of a job, under the leg of the router that sent it.

    prefill | decode             from its acceptance to its last token, or to what ended it
    ├── queue                    until it was admitted to the batch: it waits for room, and for what stores answer
    ├── compute                  until its first token: prompt tokens that no cache and no store had
    ├── generate                 from its first token to its last
    ├── handoff reserve, write   a prefill's blocks on their way to the store (`handoffs.py`)
    ├── handoff follow           a decode's, from there (`handoffs.py`)
    └── fetch                    what other stores had (`tier.py`)

The engine knows nothing of it: after each step the states of traced sequences are looked at, so times are those of
steps. Runs on the event loop. Attributes are ids, counts and reasons, never tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster import telemetry
from cluster.messages import DecodeJob, PrefillJob
from cluster.telemetry import SpanKind
from workers.sequence import Sequence, State


@dataclass(slots=True)
class _Course:
    """How far a traced sequence has come. Times are monotonic; 0: not yet."""

    sequence: Sequence
    accepted_s: float
    admitted_s: float = 0.0
    arriving: bool = False  # admitted with blocks to wait for
    running_s: float = 0.0
    first_s: float = 0.0


class Traces:
    """Of one worker; holds the traced jobs that are under way."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._courses: list[_Course] = []

    @contextmanager
    def accepting(self, sequence: Sequence, job: PrefillJob | DecodeJob) -> Iterator[None]:
        """Around what accepts a job, in the handler of its call; the sequence has its span from then on."""
        generation = job.generation
        kind = "prefill" if isinstance(job, PrefillJob) else "decode"
        about = {
            "tandem.worker": self._worker_id,
            "gen_ai.usage.input_tokens": len(generation.prompt),
            "tandem.earlier_tokens": len(generation.output),
            "tandem.exact": sequence.exact,
        }
        sequence.span = telemetry.start(kind, telemetry.caller(), about, SpanKind.SERVER)
        if not sequence.span.is_recording():
            yield
            return
        accepted_s = time.monotonic()
        try:
            with telemetry.current(sequence.span):
                yield
        except BaseException as error:
            telemetry.end(sequence.span, error=telemetry.code(error))
            raise
        self._courses.append(_Course(sequence, accepted_s))

    def look(self, began_s: float) -> None:
        """After a step that began then."""
        if self._courses:
            now_s = time.monotonic()
            self._courses = [course for course in self._courses if not _look(course, began_s, now_s)]

    def close(self) -> None:
        """The worker ends."""
        for course in self._courses:
            telemetry.end(course.sequence.span, error="closed")


def _look(course: _Course, began_s: float, now_s: float) -> bool:
    """Whether it is over."""
    sequence, parent = course.sequence, course.sequence.span
    state, emitted = sequence.state, sequence.emitted  # another thread goes on with it
    over = state is State.FINISHED
    if not course.admitted_s and (state in (State.RECEIVING, State.RUNNING) or emitted):
        course.admitted_s = max(began_s, course.accepted_s)
        course.arriving = state is State.RECEIVING
        telemetry.record("queue", parent, course.accepted_s, course.admitted_s)
    if not course.running_s and (state is State.RUNNING or emitted):
        course.running_s = max(began_s, course.admitted_s)
    if not course.first_s and emitted:
        course.first_s = now_s
        # with two tokens after the first step a whole handoff has arrived: nothing was computed for the first
        if not (course.arriving and emitted > 1 and course.running_s >= began_s):
            about = {"tandem.cached_tokens": sequence.cached}
            telemetry.record("compute", parent, course.running_s, now_s, about)
    if over:
        if course.first_s and emitted > 1:
            telemetry.record("generate", parent, course.first_s, now_s, {"tandem.tokens": emitted})
        about = {
            "gen_ai.usage.output_tokens": emitted,
            "tandem.cached_tokens": sequence.cached,
            "tandem.preemptions": sequence.preempted,
        }
        telemetry.end(parent, about, at_s=now_s)
    return over

"""What was measured, in slots of time per scenario: counts and distributions that can be added up across processes.

Nothing is rounded: Locust keeps 4 ms as 4 and 137 ms as 140, these histograms are right to half a per cent. A long run
keeps as much as a short one: beyond SLOTS slots of a scenario, slots become twice as long. What the figures mean is
figures.py's, whether they are good enough slo.py's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from loadtests.client import Answer
from loadtests.simulator.histogram import Histogram

SPANS = ("ttft", "itl", "tpot", "e2e", "late")  # in milliseconds
SLOTS = 600
LATE_S = 0.05  # a request sent later than that after its time was not sent on time
Json = dict[str, Any]


class Slot:
    """What happened in one stretch of time. Counts that are used:

    begun, failed, left, good (within the limits), late    requests
    answered                                                requests that ended well
    uncounted                                               requests whose server sent no usage
    prompt_tokens, cached_tokens, output_tokens             tokens of answered requests, by when these were sent
    streamed_tokens                                         output tokens by when they came
    """

    def __init__(self) -> None:
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.spans: defaultdict[str, Histogram] = defaultdict(Histogram)

    def merge(self, other: Slot) -> None:
        """Add all that the other one has."""
        for name, value in other.counts.items():
            self.counts[name] += value
        for name, histogram in other.spans.items():
            self.spans[name].merge(histogram)

    def to_json(self) -> Json:
        return {"counts": dict(self.counts), "spans": {name: h.to_json() for name, h in self.spans.items()}}

    @classmethod
    def from_json(cls, row: Json) -> Slot:
        """The inverse of to_json."""
        made = cls()
        made.counts.update(row["counts"])
        made.spans.update({name: Histogram.from_json(h) for name, h in row["spans"].items()})
        return made


class Measurements:
    """Slots of `slot_s` seconds since a run's beginning."""

    def __init__(self) -> None:
        self.slot_s = 1.0
        self.slots: dict[str, dict[int, Slot]] = {}  # scenario -> number of the slot -> what happened in it
        self.errors: defaultdict[tuple[str, str], int] = defaultdict(int)  # (scenario, error) -> times

    def slot(self, scenario: str, at_s: float) -> Slot:
        """The one of that time, to count in."""
        slots = self.slots.setdefault(scenario, {})
        number = int(at_s // self.slot_s)
        if number not in slots:
            slots[number] = Slot()
            if len(slots) > SLOTS:
                self._coarsen()
                return self.slot(scenario, at_s)
        return slots[number]

    def begun(self, scenario: str, at_s: float, late_s: float | None = None) -> None:
        """A request is sent, and how long after its time where it had one."""
        slot = self.slot(scenario, at_s)
        slot.counts["begun"] += 1
        if late_s is not None:
            slot.counts["late"] += late_s > LATE_S
            slot.spans["late"].add(1000 * late_s)

    def ended(self, scenario: str, start_s: float, answer: Answer, good: bool) -> None:
        """A request has its answer or failed. `start_s` is when the run began, on the answer's clock."""
        slot = self.slot(scenario, answer.sent_s - start_s)
        if answer.left:
            slot.counts["left"] += 1
            return
        if answer.error:
            slot.counts["failed"] += 1
            self.errors[scenario, answer.error] += 1
            return
        slot.counts["answered"] += 1
        slot.counts["good"] += good
        slot.counts["uncounted"] += not answer.output_tokens
        for name in ("prompt_tokens", "cached_tokens", "output_tokens"):
            slot.counts[name] += getattr(answer, name)
        slot.spans["ttft"].add(1000 * answer.ttft_s)
        slot.spans["e2e"].add(1000 * answer.e2e_s)
        if answer.tpot_s is not None:
            slot.spans["tpot"].add(1000 * answer.tpot_s)
        self._stream(scenario, start_s, answer)

    def _stream(self, scenario: str, start_s: float, answer: Answer) -> None:
        """Its chunks, each in the slot of its own time; a chunk stands for its share of the tokens."""
        share = answer.output_tokens / len(answer.times_s)
        before_s = None
        for at_s in answer.times_s:
            slot = self.slot(scenario, at_s - start_s)
            slot.counts["streamed_tokens"] += share
            if before_s is not None:
                slot.spans["itl"].add(1000 * (at_s - before_s))
            before_s = at_s

    def whole(self, scenario: str) -> Slot:
        """All of its slots as one."""
        made = Slot()
        for slot in self.slots.get(scenario, {}).values():
            made.merge(slot)
        return made

    def take(self) -> Json:
        """All of it as JSON, for `merge` elsewhere; nothing is left here."""
        slots = [
            [scenario, number, slot.to_json()]
            for scenario, slots in self.slots.items()
            for number, slot in slots.items()
        ]
        errors = [[scenario, error, times] for (scenario, error), times in self.errors.items()]
        taken = {"slot_s": self.slot_s, "slots": slots, "errors": errors}
        self.slots, self.errors = {}, defaultdict(int)
        return taken

    def merge(self, taken: Json) -> None:
        """Add what another process has taken out of its own."""
        for scenario, number, row in taken["slots"]:
            self.slot(scenario, (number + 0.5) * taken["slot_s"]).merge(Slot.from_json(row))
        for scenario, error, times in taken["errors"]:
            self.errors[scenario, error] += times

    def _coarsen(self) -> None:
        self.slot_s *= 2
        for scenario, slots in self.slots.items():
            wider: dict[int, Slot] = {}
            for number, slot in slots.items():
                wider.setdefault(number // 2, Slot()).merge(slot)
            self.slots[scenario] = wider

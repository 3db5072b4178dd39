"""One row of the table: an operation at one shape, what it must move and compute, and what it is judged by.

A row is built (inputs on the device), checked against a reference in fp32, timed, and compared with its peers. Peers
are optional: one that is missing or fails is named with its reason and costs nothing else. A row whose check fails is
not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.timing import measure

Call = Callable[[], object]
Answer = dict[str, Any]  # a row's results, as JSON
ROTATED_BYTES = 300 * 10**6  # five times the L2 cache of an H200
SPREAD = 0.05  # above it a timing is not to be relied on


@dataclass(frozen=True, slots=True)
class Case:
    calls: Sequence[Call]  # the operation, each on inputs of its own
    check: Callable[[], float]  # relative error of one of them against a reference
    tolerance: float
    peers: Mapping[str, Callable[[], Sequence[Call]]] = field(default_factory=dict)  # name -> builds its calls


@dataclass(frozen=True, slots=True)
class Row:
    kernel: str
    shape: str
    moved: float  # bytes to and from device memory, at least
    flop: float
    build: Callable[[], Case]
    gate: float | None = None  # part of the limit that it must reach
    most_us: float | None = None  # or: what it may take

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.shape}"

    def compile(self) -> None:
        """Launch everything once; for `compiled.imagined`."""
        self.build().calls[0]()

    def run(self, limits: Limits) -> Answer:
        case = self.build()
        error = case.check()
        floor = limits.floor_us(self.moved, self.flop)
        answer: Answer = {"floor_us": floor, "error": error, "tolerance": case.tolerance}
        if not error <= case.tolerance:  # NaN is not
            return answer | {"verdict": "wrong"}
        timing = measure(case.calls)
        answer |= {"us": timing.us, "fraction": floor / timing.us, "spread": timing.spread}
        answer |= {"captured": timing.captured, "verdict": self._verdict(floor, timing.us, timing.spread)}
        answer["peers"] = {name: _peer(build, timing.us) for name, build in case.peers.items()}
        return answer

    def _verdict(self, floor: float, us: float, spread: float) -> str:
        if spread > SPREAD:
            return "unsteady"
        if self.gate is not None:
            return "met" if floor / us >= self.gate else "missed"
        if self.most_us is not None:
            return "met" if us <= self.most_us else "missed"
        return ""


def sets(moved: float) -> int:
    """How many sets of inputs keep the L2 cache from answering."""
    return int(max(1, min(10, -(-ROTATED_BYTES // max(moved, 1)))))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    wanted = wanted.float()
    return float((found.float() - wanted).norm() / wanted.norm())


def _peer(build: Callable[[], Sequence[Call]], ours_us: float) -> Answer:
    try:
        us = measure(build()).us
    except Exception as problem:  # whatever another project's code raises, the row stands
        return {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"}
    return {"us": us, "ratio": us / ours_us}

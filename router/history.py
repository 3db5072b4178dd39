"""The last ten minutes of a deployment in figures, one sample a second: what the dashboard's charts are drawn from.

Samples are numbered, so that whoever asks again is told only what is new. It keeps what it is given; what the figures
are is said here and found out in `router/dashboard.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields
from typing import Any

KEPT = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """One second. None: nothing was observed in the minute before."""

    prefill: int  # workers that serve in that role
    decode: int
    both: int
    running: int  # sequences at workers
    waiting: int  # sequences at workers, and requests in this router
    kv_used: float | None  # part of all KV blocks that sequences hold
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    hit_ratio: float | None  # part of prompts' tokens that were not computed
    prompt_tokens_s: float
    output_tokens_s: float
    handoff_bytes_s: float


COLUMNS = tuple(figure.name for figure in fields(Sample))


class History:
    def __init__(self) -> None:
        self._samples: deque[list[float | None]] = deque(maxlen=KEPT)  # figures in the order of COLUMNS
        self._last = 0  # number of the newest; the first is 1

    def add(self, sample: Sample) -> None:
        self._samples.append([_short(getattr(sample, name)) for name in COLUMNS])
        self._last += 1

    def after(self, number: int) -> dict[str, Any]:
        """What came after that sample, a list of figures each, and the number of the newest."""
        new = min(len(self._samples), max(0, self._last - number))
        return {"columns": COLUMNS, "last": self._last, "samples": list(self._samples)[len(self._samples) - new :]}


def _short(figure: float | None) -> float | None:
    """Six hundred of these are sent at once: four significant digits are more than a chart can show."""
    return figure if figure is None or isinstance(figure, int) else float(f"{figure:.4g}")

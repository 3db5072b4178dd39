"""What the benchmark is made of: units, each a list of rows that one process runs within its time.

Sections are what the command line names; the largest has several units, so that a kernel that breaks the process's
CUDA context takes no other's rows with it. The times add up to less than nine minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.rows import Answer

SECTIONS = ("kernels", "engine", "handoff", "serve")


class Measured(Protocol):
    """What a unit has several of; `rows.Row` is the usual one."""

    @property
    def name(self) -> str: ...

    @property
    def moved(self) -> float: ...

    @property
    def flop(self) -> float: ...

    def compile(self) -> None:
        """Launch every kernel of it once, with tensors that have no memory."""
        ...

    def run(self, limits: Limits) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Unit:
    name: str
    section: str
    module: str  # of this package, with a function `rows`
    seconds: float  # its process, start and compilation included, is ended then

    def rows(self) -> Sequence[Measured]:
        """Raises ImportError when what the unit measures is not installed."""
        function: Callable[[], Sequence[Measured]] = import_module(f"deploy.bench.cuda.{self.module}").rows
        return function()


UNITS = (
    Unit("decode attention", "kernels", "decode", 110.0),
    Unit("prefill attention", "kernels", "prefill", 60.0),
    Unit("norm, rotation, gate", "kernels", "operations", 60.0),
    Unit("sampling", "kernels", "sampling", 40.0),
    Unit("decode step", "engine", "step", 75.0),
    Unit("parity", "engine", "parity", 84.0),
    Unit("block copies", "handoff", "movement", 30.0),
    Unit("device to host", "handoff", "transfer", 20.0),
    Unit("served", "serve", "served", 50.0),
)

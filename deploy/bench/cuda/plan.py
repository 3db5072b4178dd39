"""The dry run: every row with its bytes, FLOPs and floor, and its kernels compiled for sm_90, without a GPU.

The floors assume what one H200 measured. What is compiled is what the run would launch, with the same inputs but for
their memory, so a shape that does not fit together, a launcher that reads a value back or a kernel that does not
compile is found here and not on a GPU that is paid for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deploy.bench.cuda.compiled import SHARED_BYTES, Resources, imagined, resources
from deploy.bench.cuda.limits import ASSUMED
from deploy.bench.cuda.units import UNITS, Measured, Unit

ARCHITECTURE = 90


def plan(sections: Sequence[str], units: Sequence[Unit] = UNITS, only: str = "") -> int:
    """Print the plan of the rows whose name contains `only`; returns how many of them cannot run."""
    wrong = 0
    for unit in units:
        if unit.section not in sections:
            continue
        sys.stdout.write(f"== {unit.name}, at most {unit.seconds:.0f} s\n")
        for row in unit.rows():
            if only in row.name:
                problem, kernels = compiled(row)
                wrong += problem is not None
                sys.stdout.write(_line(row, problem, kernels) + "\n")
    return wrong


def compiled(row: Measured) -> tuple[str | None, list[Resources]]:
    """Why the row cannot run, or None; and the kernels that it launches."""
    try:
        with imagined(ARCHITECTURE) as found:
            row.compile()
        kernels = [resources(kernel) for kernel in found.values()]
    except Exception as error:  # the other rows are to be planned too
        return f"{type(error).__name__}: {error}", []
    too_large = [k.kernel for k in kernels if k.shared > SHARED_BYTES[ARCHITECTURE]]
    return f"{too_large[0]} needs more shared memory than there is" if too_large else None, kernels


def _line(row: Measured, problem: str | None, kernels: Sequence[Resources]) -> str:
    floor = ASSUMED.floor_us(row.moved, row.flop)
    text = f"{row.name} | {row.moved / 1e6:,.1f} MB, {row.flop / 1e9:,.1f} GFLOP, floor {floor:,.1f} us"
    for k in kernels:
        text += f" | {k.kernel} {k.warps} warps, {k.registers} registers, {k.shared} B"
        if k.stack or k.spills:
            text += ", SPILLS"
    return text + (f" | CANNOT RUN: {problem}" if problem else "")

"""`python -m deploy.bench.cuda`: what `tandem bench --device cuda` calls, without what the command line needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.bench.cuda.units import SECTIONS, UNITS


def bench(sections: str | None, out: Path | None, plan: bool, only: str = "") -> int:
    """The exit status: 1 when a section is unknown or a row failed."""
    chosen = sections.split(",") if sections else list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        sys.stderr.write(f"unknown section {unknown.pop()!r}; there are {', '.join(SECTIONS)}\n")
        return 1
    if plan:
        from deploy.bench.cuda.plan import plan as show

        return 1 if show(chosen, only=only) else 0
    from deploy.bench.cuda.run import run

    return 1 if any("failed" in answer for answer in run(chosen, out)) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.cuda", description=__doc__)
    parser.add_argument("--sections", help="some of " + ",".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--plan", action="store_true", help="print what would run and compile its kernels; no GPU")
    parser.add_argument("--only", default="", help="with --plan: rows whose name contains this")
    parser.add_argument("--unit", help=argparse.SUPPRESS)  # run one in this process; used by `run.py`
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.unit is None:
        return bench(given.sections, given.out, given.plan, given.only)
    from deploy.bench.cuda.run import rows_here

    rows_here(next(unit for unit in UNITS if unit.name == given.unit), given.skip, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

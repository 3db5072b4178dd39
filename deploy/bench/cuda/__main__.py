"""`python -m deploy.bench.cuda`: what `tandem bench --device cuda` calls, without what the command line needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.bench.cuda.units import SECTIONS, UNITS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.cuda", description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of " + ",".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--plan", action="store_true", help="print what would run and compile its kernels; no GPU")
    parser.add_argument("--only", default="", help="with --plan: rows whose name contains this")
    parser.add_argument("--unit", help=argparse.SUPPRESS)  # run one here; used by `run.py`
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sections = given.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()!r}; there are {', '.join(SECTIONS)}")
    if given.unit is not None:
        from deploy.bench.cuda.run import rows_here

        rows_here(next(unit for unit in UNITS if unit.name == given.unit), given.skip, given.out)
        return 0
    if given.plan:
        from deploy.bench.cuda.plan import plan

        return 1 if plan(sections, only=given.only) else 0
    from deploy.bench.cuda.run import run

    return 1 if any("failed" in answer for answer in run(sections, given.out)) else 0


if __name__ == "__main__":
    sys.exit(main())

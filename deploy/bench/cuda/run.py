"""Runs units one after another, each in a process of its own, and writes what they found.

A unit's process appends a line to a file when it begins a row and when it has ended one. A process that dies is
started again behind the row it died in; one whose time is up is killed. Either is written down, and the next unit runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bench.cuda.rows import Answer
from deploy.bench.cuda.units import UNITS, Unit

RESTARTS = 3
ERROR_CHARACTERS = 600  # of what a process that died said last
ROOT = Path(__file__).resolve().parents[3]
PROGRAM = (sys.executable, "-m", "deploy.bench.cuda")


def run(sections: Sequence[str], out: Path | None, units: Sequence[Unit] = UNITS) -> list[Answer]:
    """Every row's results, as they are also written to `out`; the table goes to standard output."""
    began = time.monotonic()
    found: list[Answer] = []
    for unit in units:
        if unit.section in sections:
            _say(f"== {unit.name}, at most {unit.seconds:.0f} s")
            answers = in_process(unit)
            for answer in answers:
                _say(line(answer))
            found += answers
    report = {"seconds": time.monotonic() - began, "rows": found}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    return found


def in_process(unit: Unit, program: Sequence[str] = PROGRAM) -> list[Answer]:
    """The unit's rows, and one more for each way in which its process failed. `program` runs the rows of --unit from
    --skip on and appends to --out."""
    deadline = time.monotonic() + unit.seconds
    lines: list[dict[str, Any]] = []
    failures: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        for attempt in range(1 + RESTARTS):
            file, log = Path(folder, f"{attempt}.jsonl"), Path(folder, f"{attempt}.log")
            done = sum("begun" in entry for entry in lines)
            given = ("--unit", unit.name, "--skip", str(done), "--out", str(file))
            failure = _process([*program, *given], log, deadline)
            lines += _entries(file)
            if failure is None:
                break
            begun = next((entry["begun"] for entry in reversed(lines) if "begun" in entry), "before its first row")
            failures.append({"unit": unit.name, "name": begun, "failed": failure})
            if time.monotonic() >= deadline or sum("begun" in entry for entry in lines) == done:
                break
    return [entry for entry in lines if "begun" not in entry] + failures


def _process(command: Sequence[str], log: Path, deadline: float) -> str | None:
    """What went wrong, or None."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    left = max(1.0, deadline - time.monotonic())
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            return "its unit's time was up"
        finally:
            if process.poll() is None:  # then whatever it started, compilers and servers, ends with it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == 0:
        return None
    return f"its process ended with {status}: {log.read_text(errors='replace')[-ERROR_CHARACTERS:].strip()}"


def _entries(file: Path) -> list[dict[str, Any]]:
    """A killed process may have left half a line."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def rows_here(unit: Unit, skip: int, out: Path) -> None:
    """In the unit's process: measure the limits, then each row from `skip` on."""
    import torch

    from deploy.bench.cuda.limits import measure

    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch can use; see what would run with --plan")
    with out.open("a", buffering=1) as file:
        limits = measure()
        if not skip:
            limit = {"bandwidth": limits.bandwidth, "flops": limits.flops, "gpu": torch.cuda.get_device_name()}
            file.write(json.dumps({"unit": unit.name, "name": "limits"} | limit) + "\n")
        for row in list(unit.rows())[skip:]:
            file.write(json.dumps({"begun": row.name}) + "\n")
            began = time.monotonic()
            answer: Answer = {"unit": unit.name, "name": row.name}
            try:
                with torch.inference_mode():
                    answer |= row.run(limits)
            except Exception as error:  # whatever it is, the other rows are wanted
                answer["failed"] = f"{type(error).__name__}: {str(error)[:ERROR_CHARACTERS]}"
            file.write(json.dumps(answer | {"seconds": time.monotonic() - began}) + "\n")
            torch.cuda.empty_cache()  # raises when the CUDA context is broken: the next process goes on


def line(answer: Answer) -> str:
    """One row for a person."""
    if "failed" in answer:
        return f"{answer['name']}: FAILED: {answer['failed']}"
    if answer["name"] == "limits":
        copied, multiplied = answer["bandwidth"] / 1e12, answer["flops"] / 1e12
        return f"copy {copied:.2f} TB/s, GEMM {multiplied:.0f} TFLOP/s ({answer['gpu']})"
    parts = [answer["name"]]
    if "us" in answer:
        parts.append(f"{answer['us']:.1f} us")
    if "fraction" in answer:
        parts.append(f"{answer['fraction']:.2f} of the limit, spread {answer['spread']:.1%}")
    parts += [
        f"{name} " + (f"{peer['us']:.1f} us ({peer['ratio']:.2f}x ours)" if "us" in peer else peer["failed"])
        for name, peer in answer.get("peers", {}).items()
    ]
    if "error" in answer:
        parts.append(f"error {answer['error']:.1e}")
    parts += [str(answer[key]) for key in ("detail", "verdict") if answer.get(key)]
    return " | ".join(parts)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

"""Applies mutations to copies of the kernels and runs the test that should notice: one process, a fork per mutation.

    TRITON_INTERPRET=1 python tests/kernels/mutating.py FOLDER [NAME ...]   a line of JSON per run: name, status, output

FOLDER gets kernels/ and tests/kernels/, and stands first on the path. Importing torch, Triton and pytest takes longer
than any of the tests, hence the forks; nothing of ours is imported before them. A run that takes longer than SECONDS is
killed, and its status is that of the signal, negative.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0
POLL_S = 0.01
KILLED, PASSED = 1, 0  # pytest's exit statuses; any other says that the test could not be run


@dataclass(frozen=True, slots=True)
class Mutation:
    name: str
    file: str  # below the root of the repository
    old: str  # in it exactly once
    new: str
    test: str  # as pytest names it


def mutations() -> list[Mutation]:
    files = sorted((ROOT / "tests" / "kernels" / "interpreted").glob("mutations_*.toml"))
    return [Mutation(**entry) for file in files for entry in tomllib.loads(file.read_text())["mutation"]]


def copy(folder: Path) -> None:
    def generated(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__"}

    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=generated)
    shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels", ignore=generated)
    shutil.copy(ROOT / "tests" / "__init__.py", folder / "tests")


def run(folder: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Exit status and output of pytest over the copy, in a process of its own."""
    output = folder / "output"
    child = os.fork()
    if not child:
        _pytest(folder, [str(folder / test) for test in tests], output)
    deadline = time.monotonic() + SECONDS
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(POLL_S)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _pytest(folder: Path, tests: list[str], output: Path) -> None:
    """In the child; does not return."""
    import pytest

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[:1] = [str(folder), str(ROOT)]  # in the place of this file's own folder
    options = ["-q", "-x", "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
    status = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(status))


def main(folder: Path, names: Collection[str]) -> None:
    """Without names: every one."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import triton.language  # noqa: F401

    sys.dont_write_bytecode = True  # a mutated file may have the size and the second of the one before it
    found = [mutation for mutation in mutations() if not names or mutation.name in names]
    copy(folder)
    status, output = run(folder, sorted({mutation.test for mutation in found}))
    _tell("unmutated", status, output)
    for mutation in found:
        path = folder / mutation.file
        text = path.read_text()
        path.write_text(text.replace(mutation.old, mutation.new))
        status, output = run(folder, [mutation.test])
        path.write_text(text)
        _tell(mutation.name, status, output)


def _tell(name: str, status: int, output: str) -> None:
    sys.stdout.write(json.dumps({"name": name, "status": status, "output": output[-2000:]}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

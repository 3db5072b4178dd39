"""The kernels' tests notice what they are for: a dropped mask, a wrong block, a missing scale, a length off by one.

The mutations lie beside the tests, in interpreted/mutations_*.toml; `mutating` applies them to copies. One of each file
on every run; MUTATIONS=all asks for the others, which take another minute.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels.mutating import KILLED, PASSED, ROOT, mutations

SECONDS = 480
ALL = os.environ.get("MUTATIONS") == "all"


def test_every_file_with_a_kernel_has_a_mutation() -> None:
    files = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("triton_*.py")}
    assert files - {mutation.file for mutation in mutations()} == set()


def test_every_mutation_is_of_one_place_and_changes_it() -> None:
    for mutation in mutations():
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name
        assert mutation.old != mutation.new, mutation.name
    names = Counter(mutation.name for mutation in mutations())
    assert set(names.values()) == {1}, names


def one_of_each_file() -> set[str]:
    return set({mutation.file: mutation.name for mutation in reversed(mutations())}.values())


@pytest.mark.timeout(SECONDS + 30)
def test_mutations_are_killed(tmp_path: Path) -> None:
    names = {mutation.name for mutation in mutations()} if ALL else one_of_each_file()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "mutating.py"), str(tmp_path), *names],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    runs = {run["name"]: run for run in map(json.loads, ended.stdout.splitlines())}
    unmutated = runs.pop("unmutated")
    assert unmutated["status"] == PASSED, unmutated["output"]
    assert runs.keys() == names
    survivors = {name: run["output"] for name, run in runs.items() if run["status"] != KILLED}
    assert survivors == {}

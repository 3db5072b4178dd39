"""The Triton kernels' machine code against golden.toml, which says what each may use. Needs no GPU, pytest or ptxas.

    python -m tests.kernels.compiling [FAMILY ...]            compare; exit status 1 and a line for whatever is worse
    python -m tests.kernels.compiling --write [FAMILY ...]    rewrite this version of Triton's part of golden.toml

Each family is compiled in a process of its own: what LLVM dislikes it answers by aborting. Registers and shared memory
may shrink and may not grow. Whatever golden.toml says, no kernel may spill, use a stack, or more shared memory than a
CTA can have; and where `compile_cases` names a tensor-core instruction, it must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.toml")
SECONDS = 300  # for one family
Found = dict[str, dict[str, Any]]  # name -> fields of deploy.bench.cuda.compiled.Resources, and what the case adds
HEADER = """\
# What the Triton kernels use, by version of Triton, family and launch: registers per thread, bytes of shared memory
# per CTA, tensor-core instructions. Written by `python -m tests.kernels.compiling --write`; a test compares.
"""


def compile_family(family: str) -> Found:
    """In this process. A kernel that does not compile raises what Triton raises, or aborts."""
    from deploy.bench.cuda.compiled import imagined, resources
    from tests.kernels.compile_cases import FAMILIES

    found: Found = {}
    for case in FAMILIES[family]():
        for architecture in case.architectures:
            with imagined(architecture) as compiled:
                case.launch()
            assert compiled, f"{case.name} launches no kernel"
            read = [resources(kernel) for kernel in compiled.values()]
            instruction = case.tensor.get(architecture)
            lacks = instruction if instruction and all(instruction not in r.tensor for r in read) else ""
            for r in read:
                name = f"sm_{architecture}, {case.name}, {r.kernel}"
                assert name not in found, f"{name} is compiled twice in one launch"
                found[name] = asdict(r) | {"lacks": lacks}
    return found


def in_process(family: str) -> Found:
    """Raises RuntimeError with the end of its output when the process fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", "--here", family],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=SECONDS,
    )
    if ended.returncode:
        raise RuntimeError(f"{family} does not compile ({ended.returncode}): {ended.stderr[-3000:]}")
    found: Found = json.loads(ended.stdout.splitlines()[-1])
    return found


def problems(found: Found, golden: Found) -> list[str]:
    """`golden` is the family's part, of this version of Triton."""
    from deploy.bench.cuda.compiled import SHARED_BYTES

    wrong = [f"{name} is in golden.toml and not compiled" for name in golden.keys() - found.keys()]
    for name, now in found.items():
        limit = SHARED_BYTES[int(name.split(",")[0].removeprefix("sm_"))]
        if now["stack"] or now["spills"]:
            wrong.append(f"{name} spills: {now['stack']} bytes of stack, {now['spills']} instructions")
        if now["shared"] > limit:
            wrong.append(f"{name} needs {now['shared']} bytes of shared memory, and a CTA can have {limit}")
        if now["lacks"]:
            wrong.append(f"{name} has no {now['lacks']}")
        if name not in golden:
            wrong.append(f"{name} is not in golden.toml")
            continue
        allowed = golden[name]
        wrong += [
            f"{name}: {now[what]} {what}, and {allowed[what]} are allowed"
            for what in ("registers", "shared")
            if now[what] > allowed[what]
        ]
        if missing := set(allowed["tensor"]) - set(now["tensor"]):
            wrong.append(f"{name} has no {', '.join(sorted(missing))} any more")
    return wrong


def read_golden() -> dict[str, dict[str, Found]]:
    """Version of Triton -> family -> name -> what it may use."""
    return tomllib.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def write_golden(golden: dict[str, dict[str, Found]]) -> None:
    text = HEADER
    for version, families in sorted(golden.items()):
        for family, kernels in sorted(families.items()):
            text += f'\n["{version}".{family}]\n'
            for name, r in kernels.items():
                tensor = ", ".join(f'"{instruction}"' for instruction in r["tensor"])
                used = f"registers = {r['registers']}, shared = {r['shared']}"
                text += f'"{name}" = {{ {used}, tensor = [{tensor}] }}\n'
    GOLDEN.write_text(text)


def main() -> int:
    from tests.kernels.compile_cases import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compiling", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one family, in this process, as JSON
    parser.add_argument("families", nargs="*", help="all, unless some are named: " + ", ".join(FAMILIES))
    given = parser.parse_args()
    if given.here:
        sys.stdout.write(json.dumps(compile_family(given.here)) + "\n")
        return 0
    count = wrong = 0
    for family in given.families or FAMILIES:
        found = in_process(family)
        golden = read_golden()
        allowed = golden.setdefault(triton.__version__, {})
        if given.write:
            allowed[family] = found
            write_golden(golden)
        lines = problems(found, allowed.get(family, {}))
        sys.stdout.write("".join(line + "\n" for line in lines))
        count, wrong = count + len(found), wrong + len(lines)
    sys.stdout.write(f"Triton {triton.__version__}: {count} kernels, {wrong} problems\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

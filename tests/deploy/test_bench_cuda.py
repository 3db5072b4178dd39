"""The benchmark for a GPU, as far as it can be proved without one: its plan, its references, and how it survives.

The references are checked with the kernels' CPU paths: whatever is created on "cuda" is created on the CPU here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from deploy.bench.cuda import decode, operations, prefill, sampling
from deploy.bench.cuda.limits import ASSUMED
from deploy.bench.cuda.plan import compiled
from deploy.bench.cuda.rows import Row
from deploy.bench.cuda.run import in_process, line
from deploy.bench.cuda.units import SECTIONS, UNITS, Unit
from deploy.cli import app


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*("cpu" if isinstance(each, str) and each == "cuda" else each for each in args), **kwargs)


def row(rows: list[Row], name: str) -> Row:
    [found] = [each for each in rows if name in each.name]
    return found


def test_the_whole_run_takes_less_than_nine_minutes() -> None:
    assert sum(unit.seconds for unit in UNITS) < 9 * 60
    assert {unit.section for unit in UNITS} == set(SECTIONS)


def test_floors() -> None:
    """64 x 4k of Llama 3 8B's heads read 1.07 GB per layer: a quarter of a millisecond at 4.3 TB/s."""
    found = row(decode.rows(), "64 x 4k, 32/8x128, blocks of 16, KV bfloat16")
    assert found.moved == pytest.approx(1.074e9, rel=0.03)
    assert ASSUMED.floor_us(found.moved, found.flop) == pytest.approx(250, rel=0.05)
    chunk = row(prefill.rows(), "2048 after 0,")
    assert chunk.flop == 4 * 32 * 128 * 2048 * 2049 / 2


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (operations.rows, "add + RMSNorm: 64 x 576"),
        (operations.rows, "RoPE + KV write: 64 tokens, 32/8x128, KV bfloat16"),
        (operations.rows, "RoPE + KV write: 64 tokens, 32/8x128, KV int8"),
        (operations.rows, "RoPE + KV write: 64 tokens, 32/8x128, KV float8_e4m3fn"),
        (operations.rows, "SwiGLU: 64 x 1536"),
        (sampling.rows, "sample: 64 x 32000, top-k 50, top-p 0.9"),
        (decode.rows, "8 x 1k"),
    ],
)
def test_references_agree_with_the_cpu(rows: Any, name: str) -> None:
    with torch.inference_mode(), OnCpu():
        case = row(rows(), name).build()
        case.calls[0]()
        assert case.check() <= case.tolerance


def test_an_8_bit_cache_has_a_reference_of_its_own() -> None:
    for lengths, dtype in (((40, 700), torch.int8), ((40, 700), torch.float8_e4m3fn)):
        with torch.inference_mode(), OnCpu():
            case = decode._build(decode.LLAMA, 16, lengths, dtype, 1e9, compared=False)
            assert case.check() <= case.tolerance


def test_prefill_has_a_reference() -> None:
    with torch.inference_mode(), OnCpu():
        case = prefill._build([7, 30], [33, 0])
        assert case.check() <= case.tolerance


@pytest.mark.parametrize("name", ["8 x 1k", "16 x 8k, 32/8x128, blocks of 16, KV int8"])
def test_the_plan_compiles_what_would_run(name: str) -> None:
    problem, kernels = compiled(row(decode.rows(), name))
    assert problem is None
    assert {kernel.kernel for kernel in kernels} == {"_decode", "_merge"}
    assert all(kernel.registers for kernel in kernels)


def test_the_plan_names_what_cannot_run() -> None:
    def build() -> Any:
        return torch.ones(2, device="cuda").tolist()  # reads a value back

    problem, kernels = compiled(Row("broken", "x", 0.0, 0.0, build))
    assert problem is not None
    assert kernels == []


def test_the_command_line_plans() -> None:
    shown = CliRunner().invoke(app, ["bench", "--device", "cuda", "--plan", "--sections", "serve"])
    assert shown.exit_code == 0, shown.output
    refused = CliRunner().invoke(app, ["bench", "--device", "cuda", "--sections", "nonsense"])
    assert refused.exit_code == 1


PROGRAM = """
import json, os, signal, sys, time
skip, out = int(sys.argv[4]), open(sys.argv[6], "a", buffering=1)
for index, row in list(enumerate(("first", "kills", "third", "hangs", "never")))[skip:]:
    out.write(json.dumps({"begun": row}) + "\\n")
    if row == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if row == "hangs":
        out.write('{"half a li')
        time.sleep(60)
    out.write(json.dumps({"unit": sys.argv[2], "name": row, "verdict": "met"}) + "\\n")
"""


def test_a_row_that_kills_its_process_or_hangs_costs_no_other(tmp_path: Path) -> None:
    script = tmp_path / "unit.py"
    script.write_text(PROGRAM)
    found = in_process(Unit("a unit", "kernels", "", 4.0), (sys.executable, str(script)))
    assert [each["name"] for each in found if "failed" not in each] == ["first", "third"]
    failed = {each["name"]: each["failed"] for each in found if "failed" in each}
    assert failed.keys() == {"kills", "hangs"}
    assert "-9" in failed["kills"]
    assert "time was up" in failed["hangs"]
    assert all(line(each) for each in found)
    json.dumps(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="to run it, hide the GPU: CUDA_VISIBLE_DEVICES=")
def test_without_a_gpu_each_unit_says_so() -> None:
    [failure] = in_process(UNITS[0])
    assert "no GPU" in failure["failed"]
    assert "--plan" in failure["failed"]

"""Every Triton kernel compiles, in every launch configuration, within what golden.toml allows. See `compiling`."""

import ast
from pathlib import Path

import pytest
import triton

from tests.kernels.compiling import SECONDS, in_process, problems, read_golden

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FAMILIES = sorted(read_golden()[triton.__version__])


def test_every_file_with_a_kernel_that_is_launched_is_compiled() -> None:
    launched = {
        path.stem
        for path in KERNELS.glob("triton_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)  # kernel[grid](...)
    }
    assert launched == set(FAMILIES)


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("family", FAMILIES)
def test_resources(family: str) -> None:
    assert problems(in_process(family), read_golden()[triton.__version__][family]) == []


def test_what_is_worse_is_found() -> None:
    good = {"registers": 96, "shared": 1000, "tensor": ["HMMA"], "stack": 0, "spills": 0, "lacks": ""}
    golden = {"sm_90, a": good}
    assert problems(golden, golden) == []
    worse = [
        {"registers": 97},
        {"shared": 1001},
        {"tensor": []},
        {"stack": 8},
        {"spills": 1},
        {"lacks": "HMMA"},
        {"shared": 232_449},
    ]
    for change in worse:
        assert problems({"sm_90, a": good | change}, golden), change
    assert problems({"sm_90, b": good}, golden)

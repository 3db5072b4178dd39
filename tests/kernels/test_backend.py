"""A worker without a GPU neither loads Triton nor needs it."""

import ast
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_triton_is_imported_only_where_a_kernel_is_called() -> None:
    files = [path for path in KERNELS.glob("*.py") if not path.stem.startswith("triton_")]
    assert len(files) > 8
    for path in files:
        for node in ast.parse(path.read_text()).body:  # what is imported with the file
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "triton" not in ast.unparse(node).replace("uses_triton", ""), f"{path.name}: {ast.unparse(node)}"

"""Slices of stored tensors against the library's own reading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import ModelError
from workers.slices import check, read_inplace, stored_tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 7), None), ((2, 5), None), ((3, 3), None), ((0, 7), (1, 4)), ((6, 7), (4, 5))]
)
def test_a_slice_is_what_was_saved(
    dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int] | None, tmp_path: Path
) -> None:
    matrix, vector = torch.randn(7, 5).to(dtype), torch.randn(7).to(dtype)
    save_file({"other": torch.randn(3), "matrix": matrix, "vector": vector}, tmp_path / "a.safetensors")
    stored = stored_tensors([tmp_path / "a.safetensors"])
    for target in (torch.float32, torch.bfloat16):
        expected = matrix[rows[0] : rows[1], slice(*columns) if columns else slice(None)].to(target)
        found = torch.empty_like(expected, memory_format=torch.contiguous_format)
        read_inplace(found, stored["matrix"], rows, columns)
        assert torch.equal(found, expected)
        found = torch.empty(rows[1] - rows[0], dtype=target)
        read_inplace(found, stored["vector"], rows)
        assert torch.equal(found, vector[rows[0] : rows[1]].to(target))


def test_a_slice_may_be_larger_than_the_buffer(tmp_path: Path) -> None:
    matrix = torch.randn(3001, 1001)
    save_file({"matrix": matrix}, tmp_path / "a.safetensors")
    found = torch.empty(2990, 1)
    read_inplace(found, stored_tensors([tmp_path / "a.safetensors"])["matrix"], (9, 2999), (1000, 1001))
    assert torch.equal(found, matrix[9:2999, 1000:])


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"matrix": torch.randn(100, 10)}, path)
    stored = stored_tensors([path])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"a\.safetensors became shorter"):
        read_inplace(torch.empty(100, 10), stored["matrix"], (0, 100))


def test_what_is_missing_different_or_too_much_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    stored = stored_tensors([tmp_path / "a.safetensors"])
    check(stored, {"a": (3, 2), "b": (4,)}, ("x",))
    check(stored, {"a": (3, 2)}, ("b",))
    for expected, reason in [
        ({"a": (3, 2)}, "b, which config.json does not call for"),
        ({"a": (3, 2), "b": (4,), "c": (1,)}, "lack c"),
        ({"a": (2, 3), "b": (4,)}, r"a in .* has shape \[3, 2\] .* implies \[2, 3\]"),
    ]:
        with pytest.raises(ModelError, match=reason):
            check(stored, expected, ("x",))  # type: ignore[arg-type]

"""Slices of the tensors in safetensors files, read without mapping a file or holding more of it than a buffer.

Mapped files count as memory of whoever touches them, and a shard may not use more than its share of a model's. Every
tensor that is called for must be there exactly once, in its shape, and nothing else: a checkpoint that needs more than
we compute is refused, not served wrongly. The check reads no values, so a shard makes it of the whole model.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import ModelError
from workers.shard import Span

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's values are: row after row, little-endian."""

    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def stored_tensors(files: list[Path]) -> dict[str, Stored]:  # name -> tensor
    """Raises ModelError, naming the file, when one is broken, or when a tensor is in two."""
    found: dict[str, Stored] = {}
    for path in files:
        for name, tensor in _header(path).items():
            if name in found:
                raise ModelError(f"{name} is in both {found[name].path} and {path}; download the model again")
            found[name] = tensor
    return found


def check(stored: dict[str, Stored], expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...]) -> None:
    """`expected` maps names to shapes; what ends in one of `ignored` may be there too. Raises ModelError, naming the
    tensor at fault."""
    for name, shape in expected.items():
        if name not in stored:
            raise ModelError(f"the weights lack {name}, which config.json calls for; is the download complete?")
        tensor = stored[name]
        if tensor.dtype not in FLOATS:
            raise ModelError(f"{name} in {tensor.path} has type {tensor.dtype}; quantized weights are not supported")
        if tensor.shape != shape:
            raise ModelError(
                f"{name} in {tensor.path} has shape {[*tensor.shape]} where config.json implies {[*shape]}"
            )
    for name, tensor in stored.items():
        if name not in expected and not name.endswith(ignored):
            raise ModelError(f"{tensor.path} has {name}, which config.json does not call for; is it this model's?")


def read_inplace(target: Tensor, stored: Stored, rows: Span, columns: Span | None = None) -> None:
    """Fill `target` [rows, columns], or [rows] of a vector, contiguous, of any float type and on any device."""
    width = math.prod(stored.shape[1:])  # 1 for a vector
    first_column, last_column = columns or (0, width)
    out = target.view(-1, last_column - first_column)
    dtype = FLOATS[stored.dtype]
    row_bytes = width * dtype.itemsize
    height = max(1, READ_BYTES // row_bytes)
    buffer = torch.empty(min(height, rows[1] - rows[0]), width, dtype=dtype)
    raw: memoryview = buffer.view(-1).view(torch.uint8).numpy().data
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.offset + rows[0] * row_bytes)
        for first in range(0, rows[1] - rows[0], height):
            part = out[first : first + height]
            wanted = raw[: len(part) * row_bytes]
            while wanted:
                count = file.readinto(wanted)
                if not count:
                    raise ModelError(f"{stored.path} became shorter while it was read; download it again")
                wanted = wanted[count:]
            part.copy_(buffer[: len(part), first_column:last_column])


def _header(path: Path) -> dict[str, Stored]:
    """(https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the bytes.)"""
    try:
        with safe_open(path, framework="np"):
            pass  # the library's judgement of the file: it is whole, and no tensor overlaps another
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    entries.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }

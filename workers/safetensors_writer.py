"""Writes a model's weights as safetensors files without ever holding more than one tensor.

The library's own writer wants all tensors of a file in memory at once; the format is small enough to stream: the
length of a JSON header, the header, then the bytes of each tensor (https://huggingface.co/docs/safetensors). Only the
two types a converted model has. Reading is the library's business.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

SHARD_BYTES = 2 * 2**30  # a file ends before the tensor that would take it over
ITEMSIZE = {"F32": 4, "BF16": 2}
ALIGNMENT = 8  # of the first tensor's bytes, so that a mapped file can be viewed in place


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write. Its shape and type are known before its values are."""

    shape: tuple[int, ...]
    dtype: str  # F32 or BF16
    values: Callable[[], npt.NDArray[Any]]  # makes the numbers [shape], those of BF16 as uint16

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def write_shards(directory: Path, tensors: dict[str, Planned], progress: Callable[[float], None]) -> None:
    """model.safetensors, or numbered files and their index when it would exceed SHARD_BYTES."""
    shards = _shards(tensors)
    total, written = sum(tensor.nbytes for tensor in tensors.values()), 0
    weight_map: dict[str, str] = {}

    def advance(size: int) -> None:
        nonlocal written
        written += size
        progress(written / total)

    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, {name: tensors[name] for name in names}, advance)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: dict[str, Planned]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _write_file(path: Path, tensors: dict[str, Planned], advance: Callable[[int], None]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(tensor.values().astype("<f4" if tensor.dtype == "F32" else "<u2", copy=False).tobytes())
            advance(tensor.nbytes)

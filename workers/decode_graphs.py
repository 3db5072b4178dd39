"""Decode steps as CUDA graphs: one per bucket of (rows, keys), captured at the start, replayed for whatever fits.

A step of decodes launches some ten kernels per layer, and to launch them takes longer than a small model computes. A
graph is launched once. It has the sizes, and the addresses, that it was captured with, so a step is padded to the
smallest bucket that holds it, and its words are copied to where the graph reads them. Steps with prefills are long
enough to be launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention import CHUNK
from workers.device import Device
from workers.device_batch import WORD, DeviceBatch, Plan, Shape, Words, fields, fill

KEYS_STEP = 4  # buckets of keys are this factor apart: idle programs end at once, yet each has to be started
ROWS_STEP = 8  # buckets of rows above this many are as far apart: one row of padding costs what a row costs
T = TypeVar("T")


def buckets(max_sequences: int, max_context: int, block_size: int) -> list[Shape]:
    """What is captured, the largest first: later ones then live in the memory of the first."""
    shapes = [_shape(rows, keys, block_size) for rows in _rows(max_sequences) for keys in _keys(max_context)]
    return sorted(shapes, key=lambda shape: (shape.rows, shape.width), reverse=True)


def _rows(most: int) -> list[int]:
    below = [rows for rows in (1, 2, 4) if rows < most]
    return [*below, *range(ROWS_STEP, most, ROWS_STEP), most]


def _keys(most: int) -> list[int]:
    found = [CHUNK]
    while found[-1] < most:
        found.append(found[-1] * KEYS_STEP)
    return [*found[:-1], min(found[-1], -(-most // CHUNK) * CHUNK)]


def _shape(rows: int, keys: int, block_size: int) -> Shape:
    """Of a step in which every row may have that many keys."""
    return Shape(rows, rows, -(-keys // block_size), rows, rows * (keys // CHUNK), 0, rows, rows)


class Staging:
    """Words in pinned memory on their way to the device."""

    def __init__(self, device: Device, block_size: int) -> None:
        self._device, self._block_size = device, block_size
        self._pinned, self._next = device.staging(0), device.staging(0)

    def send(self, step: Plan | None, shape: Shape, target: Tensor | None = None) -> Tensor:
        """Copies the words of a step, to `target` or to new memory, and returns where they are. The step before the
        last must have ended: its words may still be on their way until then."""
        count = fields(shape)[1]
        self._pinned, self._next = self._next, self._pinned
        if self._pinned.numel() < count * WORD:
            self._pinned = self._device.staging(count * WORD)
        source = self._pinned[: count * WORD].view(torch.int32)
        words: Words = source.numpy().view(np.int32)
        fill(words, shape, step, self._block_size)
        if target is None:
            target = torch.empty(count, dtype=torch.int32, device=self._device.place)
        return target[:count].copy_(source, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Captured(Generic[T]):
    shape: Shape
    batch: DeviceBatch
    replay: Callable[[], T]


class DecodeGraphs(Generic[T]):
    """Of one stage. What `compute` returns for a bucket is in the same memory every time, until the next replay."""

    def __init__(
        self, device: Device, staging: Staging, shapes: list[Shape], compute: Callable[[DeviceBatch], T]
    ) -> None:
        """Captures all. Raises RuntimeError when that cannot be done."""
        self._staging = staging
        self._words = torch.empty(max(fields(shape)[1] for shape in shapes), dtype=torch.int32, device=device.place)
        self._captured = [self._capture(device, shape, compute) for shape in shapes]

    def _capture(self, device: Device, shape: Shape, compute: Callable[[DeviceBatch], T]) -> _Captured[T]:
        words = self._staging.send(None, shape, self._words)
        device.synchronize()  # before the next bucket's words take the place of these
        batch = DeviceBatch.over(words, shape)
        return _Captured(shape, batch, device.capture(lambda: compute(batch)))

    def run(self, step: Plan, prepare: Callable[[Plan, DeviceBatch], None]) -> T | None:
        """`prepare` is what precedes the graph. None: no bucket holds the step."""
        fitting = [captured for captured in self._captured if captured.shape.holds(step.shape)]
        if not fitting:
            return None
        captured = fitting[-1]  # the smallest
        self._staging.send(step, captured.shape, self._words)
        prepare(step, captured.batch)
        return captured.replay()

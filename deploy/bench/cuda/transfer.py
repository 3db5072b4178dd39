"""Rows of a handoff's way between the GPU and the host: blocks gathered and copied into pinned memory, and back.

The limit is a plain copy between pinned memory and the device, measured in the same row. Blocks as in `movement.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.movement import DIM, HEADS, LAYERS
from deploy.bench.cuda.rows import SPREAD, Answer, Call
from deploy.bench.cuda.timing import Stopwatch
from kernels.block_copy import gather_blocks, scatter_blocks

BLOCK_SIZE = 16
ELEMENTS = HEADS * LAYERS * 2 * BLOCK_SIZE * DIM
GATE = 0.85
REPETITIONS = 11
POOL = 4


@dataclass(frozen=True, slots=True)
class Transfer:
    to_host: bool
    blocks: int  # of 2 MiB

    @property
    def name(self) -> str:
        return f"{'gather, device to host' if self.to_host else 'host to device, scatter'}: {self.blocks} blocks"

    @property
    def moved(self) -> float:
        """In device memory."""
        return 3.0 * self.blocks * ELEMENTS * 2

    @property
    def flop(self) -> float:
        return 0.0

    def compile(self) -> None:
        host = torch.empty(self.blocks, ELEMENTS, dtype=torch.bfloat16)
        self._calls(host)[0]()

    def run(self, limits: Limits) -> Answer:
        host = torch.empty(self.blocks, ELEMENTS, dtype=torch.bfloat16, pin_memory=True).normal_()
        ours, plain, check = self._calls(host)
        watch = Stopwatch()
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for repetition in range(REPETITIONS + 1):
            for name, call in (("ours", ours), ("plain", plain)):
                us = watch.us(call)
                if repetition:  # the first warms up
                    times[name].append(us)
        ours()
        if not check():
            return {"verdict": "wrong"}
        us, limit = statistics.median(times["ours"]), statistics.median(times["plain"])
        spread = (max(times["ours"]) - min(times["ours"])) / us
        verdict = "unsteady" if spread > 4 * SPREAD else "met" if limit / us >= GATE else "missed"
        rate = self.blocks * ELEMENTS * 2 / us / 1e3
        return {
            "us": us,
            "floor_us": limit,
            "fraction": limit / us,
            "spread": spread,
            "detail": f"{rate:.1f} GB/s",
            "verdict": verdict,
        }

    def _calls(self, host: torch.Tensor) -> tuple[Call, Call, Call]:
        """Ours, the plain copy, and whether ours moved what it should."""
        shape = (POOL * self.blocks, HEADS, LAYERS, 2, BLOCK_SIZE, DIM)
        cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        staging = torch.empty(self.blocks, ELEMENTS, dtype=torch.bfloat16, device="cuda")
        ids = torch.randperm(POOL * self.blocks, device="cuda")[: self.blocks].int()

        def out() -> None:
            gather_blocks(cache, ids, staging)
            host.copy_(staging, non_blocking=True)

        def back() -> None:
            staging.copy_(host, non_blocking=True)
            scatter_blocks(cache, ids, staging)

        def check() -> bool:
            torch.cuda.synchronize()
            return torch.equal(cache.view(len(cache), -1)[ids.long()].cpu(), host)

        if self.to_host:
            return out, lambda: host.copy_(staging, non_blocking=True), check
        return back, lambda: staging.copy_(host, non_blocking=True), check


def rows() -> Sequence[Transfer]:
    return [Transfer(to_host, blocks) for to_host in (True, False) for blocks in (8, 256)]

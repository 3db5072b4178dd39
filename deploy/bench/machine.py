"""The machine's own limits, through torch: memory bandwidth and GEMM rate. All else is a fraction of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deploy.bench.report import Figure, seconds

REPETITIONS = 7
READ_BYTES = 512 * 2**20
GEMM = 2048  # M = N = K


@dataclass(frozen=True, slots=True)
class Machine:
    read: float  # bytes/s
    copy: float  # bytes/s, read plus written
    flops: float  # multiply-adds counted twice, in the model's dtype

    def roofline_s(self, flop: float, read_bytes: float) -> float:
        """Least time of a step that computes and streams at once (Williams et al., 2009)."""
        return max(flop / self.flops, read_bytes / self.read)


def measure(dtype: torch.dtype) -> tuple[Machine, list[Figure]]:
    source = torch.ones(READ_BYTES // 4)
    target = torch.empty_like(source)
    left = torch.randn(GEMM, GEMM).to(dtype)
    # the best of several: noise only ever slows a run down
    read = READ_BYTES / _best(lambda: source.sum())
    copy = 2 * READ_BYTES / _best(lambda: target.copy_(source))
    flops = 2 * GEMM**3 / _best(lambda: left @ left)
    figures = [
        Figure("machine", "memory read", read / 1e9, "GB/s"),
        Figure("machine", "memory copy, read + write", copy / 1e9, "GB/s"),
        Figure(
            "machine", f"GEMM {dtype}, {torch.get_num_threads()} threads".replace("torch.", ""), flops / 1e9, "GFLOP/s"
        ),
    ]
    return Machine(read, copy, flops), figures


def _best(work: Callable[[], object]) -> float:
    work()
    return min(seconds(work) for _ in range(REPETITIONS))

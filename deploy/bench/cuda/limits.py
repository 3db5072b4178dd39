"""The GPU's own limits through torch, which everything else is a fraction of: copy bandwidth and GEMM rate.

Measured at the start of every process that measures anything, on random data: zeros multiply 13 % faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deploy.bench.cuda.timing import Stopwatch

COPY_BYTES = 4 * 2**30
GEMM = 8192  # M = N = K
REPETITIONS = 20


@dataclass(frozen=True, slots=True)
class Limits:
    bandwidth: float  # bytes/s of a copy within device memory, read plus written
    flops: float  # per second of a bfloat16 matrix product, multiply-adds counted twice

    def floor_us(self, moved: float, flop: float) -> float:
        """Least time of something that computes and moves bytes at once (Williams et al., 2009)."""
        return 1e6 * max(moved / self.bandwidth, flop / self.flops)


ASSUMED = Limits(bandwidth=4.3e12, flops=0.78e15)  # what one H200 measured; only the plan uses it


def measure() -> Limits:
    limits = Limits(2 * COPY_BYTES / _copy_s(), 2 * GEMM**3 / _product_s())
    torch.cuda.empty_cache()
    return limits


def _copy_s() -> float:
    source = torch.randint(-(2**62), 2**62, (COPY_BYTES // 8,), device="cuda")
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source))


def _product_s() -> float:
    left, right = torch.randn(2, GEMM, GEMM, device="cuda", dtype=torch.bfloat16).unbind()
    return _median_s(lambda: torch.mm(left, right))


def _median_s(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    watch = Stopwatch()
    return statistics.median(watch.us(work) for _ in range(REPETITIONS)) / 1e6

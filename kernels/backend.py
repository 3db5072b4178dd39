"""Which implementation of an operation serves a tensor: the Triton kernel on a GPU, torch on a CPU.

With TRITON_INTERPRET=1, Triton's interpreter runs the kernels on the CPU: slow, and meant for tests. Triton is imported
where a kernel is called and nowhere else, so that a worker without a GPU neither loads nor needs it.
"""

from __future__ import annotations

import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once too, when a kernel is decorated


def uses_triton(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED
